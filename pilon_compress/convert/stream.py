"""Hidden states of every batch on their way through the blocks of a model, one block at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.convert.calibration import Batch
from pilon_compress.errors import BadInput
from pilon_compress.families import FAMILIES

if TYPE_CHECKING:
    from pilon_compress.convert.source import Source


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The transformer blocks of `model` (dense or PILON), first to last, by module name below the base model.

    Known architectures by their table row, others by the longest list of modules. Raises BadInput if there is none.
    """
    base = model.base_model
    family = FAMILIES.get(model.config.model_type)
    path = family.layers if family else None
    if path is None:
        lists = [(len(m), name) for name, m in base.named_modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise BadInput(f"{type(base).__name__} has no list of layers")
        path = max(lists, key=lambda item: item[0])[1]
    return {f"{path}.{index}": block for index, block in base.get_submodule(path).named_children()}


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returned: some architectures return a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


class Stream:
    """The hidden states that enter block `position`, for every batch, and what else each block is called with.

        stream = Stream(source, batches)     embeddings only: `hidden[b]` (B, T, d) enters the first block
        other = stream.fork()                the same states and arguments, to be advanced by other blocks
        stream.advance(block)                through `block` without gradient; position + 1
        stream.call(block, b, hidden)        one block on any states, with gradient where it is enabled
        stream.finish(b, hidden)             what the model makes of states that leave its last block

    Of the source's model only what lies outside the blocks is run: its blocks may be on the meta device. Masks and
    positional arguments are kept for every block (Gemma and Qwen give blocks of different attention different ones);
    blocks mostly share the same tensors, so this costs little memory. States: batches · B · T · d numbers on the
    model's device. The states of PILON and dense streams start equal, since conversion leaves embeddings alone.
    """

    def __init__(self, source: "Source", batches: Sequence[Batch]) -> None:
        self.model, self.batches, self.device = source.model, batches, source.device
        self.names = source.names
        self.masks = [batch.attention_mask.to(self.device).bool() for batch in batches]
        self.position = 0
        self.hidden: list[Tensor] = []
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._tuples = source.tuples
        with source.block(0) as first:
            self._capture(first)
        source.tuples = self._tuples

    @torch.no_grad()
    def _capture(self, first: nn.Module) -> None:
        """Call the model with blocks that only note what they are given and pass the states on.

        The first block runs once for real: only its output shows whether the model expects tensors or tuples.
        """
        for batch in self.batches:
            calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

            def note(*args: Any, calls: Any = calls, **kwargs: Any) -> Any:
                kwargs = dict(kwargs)
                hidden, rest = (kwargs.pop("hidden_states"), args) if "hidden_states" in kwargs else (args[0], args[1:])
                calls.append((hidden, rest, kwargs))
                if self._tuples is None:
                    self._tuples = isinstance(type(first).forward(first, hidden, *rest, **kwargs), tuple)
                return self._returned(hidden)

            with self._standing_in(note):
                run_base(self.model, batch, self.device)
            self.hidden.append(calls[0][0])
            self._arguments.append([(args, kwargs) for _, args, kwargs in calls])

    def _returned(self, hidden: Tensor) -> Any:
        return (hidden,) if self._tuples else hidden

    @contextmanager
    def _standing_in(self, forward: Callable[..., Any]) -> Iterator[None]:
        """`forward` in the place of every block's."""
        layers = list(blocks(self.model).values())
        for layer in layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def fork(self) -> "Stream":
        """A second stream at the same position. States are never changed in place, so nothing is copied."""
        other = object.__new__(Stream)
        other.__dict__.update(self.__dict__)
        other.hidden = list(self.hidden)
        return other

    def call(self, block: nn.Module, index: int, hidden: Tensor, position: int | None = None) -> Tensor:
        """`block`, standing at `position` (default: the stream's), on states `hidden` (B, T, d) of batch `index`."""
        args, kwargs = self._arguments[index][self.position if position is None else position]
        return hidden_of(block(hidden, *args, **kwargs))

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Send the states of every batch through `block`, dense or PILON, which stands at the stream's position."""
        for index, hidden in enumerate(self.hidden):  # one by one, so that only one batch is there twice
            self.hidden[index] = self.call(block, index, hidden)
        self.position += 1

    def finish(self, index: int, hidden: Tensor, rows: slice, head: bool) -> Tensor:
        """Logits (b, T, V) with `head`, else last hidden states (b, T, d), of `rows` of batch `index`.

        `hidden` (b, T, d): states of those rows that leave the last block, with gradient where it is enabled.
        """
        batch = self.batches[index]
        part = Batch(batch.input_ids[rows], batch.attention_mask[rows])
        with self._standing_in(lambda *args, **kwargs: self._returned(hidden)):
            if not head:
                return run_base(self.model, part, self.device).last_hidden_state
            ids, mask = part.input_ids.to(self.device), part.attention_mask.to(self.device)
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def run_base(model: PreTrainedModel, batch: Batch, device: torch.device | None = None) -> Any:
    """The base model's output (no head) on one batch, without a key-value cache."""
    no_cache = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    device = device or model.device
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    return model.base_model(input_ids=ids, attention_mask=mask, **no_cache)
