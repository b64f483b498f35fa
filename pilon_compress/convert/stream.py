"""Hidden states of every batch on their way through the blocks of a model, one block at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.convert.calibration import Batch
from pilon_compress.errors import BadInput
from pilon_compress.families import FAMILIES


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

        stream = Stream(dense, batches)      embeddings only: `hidden[b]` (B, T, d) enters the first block
        other = stream.fork()                the same states and arguments, to be advanced by other blocks
        stream.advance(block)                through `block` without gradient; position + 1
        stream.call(block, b, hidden)        one block on any states, with gradient where it is enabled

    Masks and positional arguments are kept for every block (Gemma and Qwen give blocks of different attention different
    ones); blocks mostly share the same tensors, so this costs little memory. States: batches · B · T · d numbers on the
    model's device. The states of PILON and dense streams start equal, since conversion leaves embeddings alone.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.names = list(blocks(model))
        self.masks = [batch.attention_mask.to(model.device).bool() for batch in batches]
        self.position = 0
        self.hidden: list[Tensor] = []
        self._arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._capture(model, batches)

    @torch.no_grad()
    def _capture(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Call the model with blocks that only note what they are given and pass the states on."""
        layers = list(blocks(model).values())
        for batch in batches:
            calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []
            for layer in layers:
                # the first batch runs for real: only a real output shows whether the model expects tensors or tuples
                layer.forward = _noting(calls, layer.forward if not self.hidden else None, layer)
            try:
                run_base(model, batch)
            finally:
                for layer in layers:
                    del layer.forward
            self.hidden.append(calls[0][0])
            self._arguments.append([(args, kwargs) for _, args, kwargs in calls])
        for layer in layers:
            layer.__dict__.pop("_returns_tuple", None)

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
        self.hidden = [self.call(block, index, hidden) for index, hidden in enumerate(self.hidden)]
        self.position += 1


def run_base(model: PreTrainedModel, batch: Batch) -> Any:
    """The base model's output (no head) on one batch, without a key-value cache."""
    no_cache = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
    ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
    return model.base_model(input_ids=ids, attention_mask=mask, **no_cache)


def _noting(calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]], real: Any, layer: nn.Module) -> Callable:
    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        hidden, rest = (kwargs.pop("hidden_states"), args) if "hidden_states" in kwargs else (args[0], args[1:])
        calls.append((hidden, rest, kwargs))
        if real is not None:
            output = real(hidden, *rest, **kwargs)
            layer.__dict__["_returns_tuple"] = isinstance(output, tuple)
            return output
        return (hidden,) if layer.__dict__["_returns_tuple"] else hidden

    return forward
