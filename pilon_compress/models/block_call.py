"""Find and replace the hidden states among a transformer block's arguments and results, for any architecture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pilon_compress.errors import BadInput


@dataclass(frozen=True)
class BlockArguments:
    """The arguments of one block without its hidden states. `slot`: the position or keyword of the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, "BlockArguments"]:
        """Return the hidden states among a block's arguments, and the other arguments.

        They are the keyword `hidden_states`, else the first floating-point tensor of three dimensions or more. Raises
        BadInput if there is none.
        """
        candidates: dict[int | str, Any] = {}
        if "hidden_states" in kwargs:
            candidates["hidden_states"] = kwargs["hidden_states"]
        candidates |= dict(enumerate(args)) | kwargs
        for slot, value in candidates.items():
            if torch.is_tensor(value) and value.is_floating_point() and value.dim() >= 3:
                if isinstance(slot, int):
                    return value, cls((*args[:slot], None, *args[slot + 1 :]), kwargs, slot)
                return value, cls(args, {key: other for key, other in kwargs.items() if key != slot}, slot)
        raise BadInput("its blocks are called without hidden states (batch, tokens, width)")

    def filled(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments with `hidden` in its place."""
        if isinstance(self.slot, int):
            return (*self.args[: self.slot], hidden, *self.args[self.slot + 1 :]), self.kwargs
        return self.args, {**self.kwargs, self.slot: hidden}


@dataclass(frozen=True)
class BlockOutput:
    """A block's return value without its hidden states, which a stand-in for the block fills with others.

    `place` is the position or key of the hidden states, None where nothing else is returned.
    """

    rest: Any
    place: int | str | None

    @classmethod
    def split(cls, output: Any) -> "BlockOutput":
        """Return `output` without its hidden states, `hidden_of(output)`."""
        place = _place(output)
        if place is None:
            return cls(None, None)
        return cls(_with(output, place, None), place)

    def filled(self, hidden: Tensor) -> Any:
        """Return a block's return value with `hidden` as its hidden states."""
        return hidden if self.place is None else _with(self.rest, self.place, hidden)

    @property
    def is_plain(self) -> bool:
        """True if nothing beside the hidden states depends on the batch."""
        return not _holds_tensor(self.rest)


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in what a block returned: the tensor, or the first one of a tuple, list or mapping.

    Raises BadInput for any other output.
    """
    place = _place(output)
    hidden: Tensor = output if place is None else output[place]
    return hidden


def _place(output: Any) -> int | str | None:
    if torch.is_tensor(output):
        return None
    if isinstance(output, Mapping):
        places: Sequence[Any] = list(output)
    elif isinstance(output, (tuple, list)):
        places = range(len(output))
    else:
        raise BadInput(f"its blocks return {type(output).__name__}, not hidden states")
    for place in places:
        if torch.is_tensor(output[place]) and output[place].is_floating_point():
            return place  # type: ignore[no-any-return]
    raise BadInput("its blocks return no hidden states")


def _with(output: Any, place: Any, value: Any) -> Any:
    """Copy `output` with another value at `place`."""
    if isinstance(output, Mapping):
        return type(output)(**{key: value if key == place else other for key, other in output.items()})
    parts = [value if index == place else other for index, other in enumerate(output)]
    if isinstance(output, list):
        return parts
    return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)


def _holds_tensor(value: Any) -> bool:
    if torch.is_tensor(value):
        return True
    if isinstance(value, Mapping):
        return any(_holds_tensor(part) for part in value.values())
    return isinstance(value, (tuple, list)) and any(_holds_tensor(part) for part in value)
