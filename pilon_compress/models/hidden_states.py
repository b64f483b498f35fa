"""Carry the hidden states of every batch through the blocks of a model, one block at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models.block_call import Call, Result, hidden_of
from pilon_compress.models.blocks import blocks
from pilon_compress.models.task import text_config
from pilon_compress.nn.functional import mean_pooled

if TYPE_CHECKING:
    from pilon_compress.models.source import Source

__all__ = ["Stream", "blocks", "hidden_of", "run_base"]


class Stream:
    """The hidden states that enter block `position`, for every batch, and the other arguments of every block.

        stream = Stream(source, batches)     embeddings only: `hidden[b]` (B, T, d) enters the first block
        other = stream.fork()                a copy, to be advanced by other blocks
        stream.advance(block)                through `block` without gradient; position + 1
        stream.call(block, b, hidden)        one block on any states, with gradient where it is enabled
        stream.finish(b, hidden)             final norm (and head) on states that leave the last block

    Only the modules outside the blocks and the first block run; the other blocks may be on the meta device. Masks and
    positional arguments are stored for every block (Gemma and Qwen give different ones to blocks of different
    attention); most blocks share them, so this costs little memory. The states are batches · B · T · d values on the
    model's device. Streams of a PILON and a dense model start equal, since conversion does not change embeddings.
    `masks[b]` (B, T) is True where a token is not padding; `block_masks[b]` has the layout of tensors inside the
    blocks, which is (T, B) for some architectures (XLNet).
    """

    def __init__(self, source: "Source", batches: Sequence[Batch]) -> None:
        """Run the embeddings on every batch.

        Raises BadInput for an architecture that does not call each block once, in order, on states (B, T, d).
        """
        self.model, self.batches, self.device = source.model, batches, source.device
        self.names = source.names
        self.masks = [batch.mask.to(self.device) for batch in batches]
        self.position = 0
        self.hidden: list[Tensor] = []
        self.time_first = False
        self._calls: list[list[Call]] = []
        self._results: list[Result] = []
        with source.block(0) as first:
            self._capture(first)
        self.block_masks = [mask.T if self.time_first else mask for mask in self.masks]

    @torch.no_grad()
    def _capture(self, first: nn.Module) -> None:
        """Record the arguments of every block by running the model with blocks that return the states unchanged.

        The first block runs for real: its output shows what the model expects beside the hidden states (a tuple with
        None, the position bias of T5). A probe batch of unequal sides shows which dimension counts the tokens.
        """
        forward = type(first).forward
        probe = _oblong(self.batches[0])
        hidden, _, result = self._run_standing_in(probe, lambda *args, **kwargs: forward(first, *args, **kwargs))
        self.time_first = self._is_time_first(hidden, probe)
        for batch in self.batches:
            hidden, calls, own = self._run_standing_in(
                batch, None if result.is_plain else lambda *args, **kwargs: forward(first, *args, **kwargs), result
            )
            self.hidden.append(self.turned(hidden))
            self._calls.append(calls)
            self._results.append(own)

    def _run_standing_in(
        self, batch: Batch, first: Callable[..., Any] | None, result: Result | None = None
    ) -> tuple[Tensor, list[Call], Result]:
        """Run the model on `batch` with stand-ins for its blocks.

        Returns the states that enter the first block, every block's other arguments, and the stand-ins' return value
        without the states: `result`, or that of `first` called in the place of the first block.
        """
        entered: list[Tensor] = []
        calls: list[tuple[int, Call]] = []
        results: list[Result] = [] if result is None or first is not None else [result]

        def stand_in(index: int) -> Callable[..., Any]:
            def note(*args: Any, **kwargs: Any) -> Any:
                hidden, call = Call.split(args, kwargs)
                entered.append(hidden)
                calls.append((index, call))
                if not results:
                    assert first is not None
                    results.append(Result.split(first(*args, **kwargs)))
                return results[0].filled(hidden)

            return note

        with self._standing_in(stand_in):
            run_base(self.model, batch, self.device)
        names = list(blocks(self.model))
        if [names[index] for index, _ in calls] != self.names:
            raise BadInput(
                f"{type(self.model).__name__} does not run each of its {len(names)} blocks once, first to last "
                f"({len(calls)} calls): it cannot be converted block by block"
            )
        return entered[0], [call for _, call in calls], results[0]

    def _is_time_first(self, hidden: Tensor, batch: Batch) -> bool:
        """Return True if states are (T, B, d). Raises BadInput if they are neither that nor (B, T, d)."""
        shape, (rows, tokens) = tuple(hidden.shape), batch.input_ids.shape
        if len(shape) != 3 or shape[:2] not in ((rows, tokens), (tokens, rows)):
            raise BadInput(
                f"the blocks of {type(self.model).__name__} pass on states of shape {shape} for {rows} x {tokens} "
                "tokens, not (batch, tokens, width): it cannot be converted"
            )
        return shape[:2] != (rows, tokens)

    def turned(self, hidden: Tensor) -> Tensor:
        """Turn states (B, T, d) into the layout of the blocks, or back."""
        return hidden.transpose(0, 1) if self.time_first else hidden

    @contextmanager
    def _standing_in(self, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Replace every block's forward by `forward(index)` inside the context."""
        layers = list(blocks(self.model).values())
        for index, layer in enumerate(layers):
            layer.forward = forward(index)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def fork(self) -> "Stream":
        """Return a second stream at the same position. States are never changed in place, so no tensor is copied."""
        other = object.__new__(Stream)
        other.__dict__.update(self.__dict__)
        other.hidden = list(self.hidden)
        return other

    @property
    def vocab_size(self) -> int:
        """Return the number of logits of a language model."""
        size: int = text_config(self.model.config).vocab_size
        return size

    def call(self, block: nn.Module, index: int, hidden: Tensor, position: int | None = None) -> Tensor:
        """Run `block` as that of `position` (default: the stream's) on states `hidden` (B, T, d) of batch `index`."""
        call = self._calls[index][self.position if position is None else position]
        args, kwargs = call.filled(self.turned(hidden))
        return self.turned(hidden_of(block(*args, **kwargs)))

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Run `block`, dense or PILON, at the stream's position on the states of every batch; position + 1."""
        for index, hidden in enumerate(self.hidden):  # one by one, so that only one batch is in memory twice
            self.hidden[index] = self.call(block, index, hidden)
        self.position += 1

    def finish(self, index: int, hidden: Tensor, rows: slice, head: bool) -> Tensor:
        """Run the final norm, and the head with `head`, on the last block's output for `rows` of batch `index`.

        `hidden` (b, T, d). Returns logits (b, T, V), or last hidden states (b, T, d), with gradient where enabled.
        """
        part = self.batches[index].rows(rows)
        output = self._results[index].filled(self.turned(hidden))
        with self._standing_in(lambda _: lambda *args, **kwargs: output):
            return run_head(self.model, part, self.device) if head else last_states(self.model, part, self.device)


def run_base(model: PreTrainedModel, batch: Batch, device: torch.device | None = None) -> Any:
    """Run the base model (no head) on one batch without a key-value cache, and return its output."""
    no_cache = {"use_cache": False} if getattr(text_config(model.config), "use_cache", None) is not None else {}
    device = device or model.device
    # on the meta device, code that inspects the mask's values fails
    mask = {} if device.type == "meta" else {"attention_mask": batch.mask.long().to(device)}
    return model.base_model(input_ids=batch.input_ids.to(device), **mask, **no_cache)


def last_states(model: PreTrainedModel, batch: Batch, device: torch.device | None = None) -> Tensor:
    """Return the last hidden states (B, T, d) of one batch. Raises BadInput for a model that returns none."""
    states: Tensor | None = getattr(run_base(model, batch, device), "last_hidden_state", None)
    if states is None:
        raise BadInput(
            f"the base model of {type(model).__name__} returns no last hidden states: it cannot be converted"
        )
    return states


def embeddings(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return embeddings (B, d), float32, of the texts of one batch: means of the last hidden states over tokens."""
    states = last_states(model, batch)
    return mean_pooled(states.float(), batch.mask.to(states.device))


def run_head(model: PreTrainedModel, batch: Batch, device: torch.device | None = None) -> Tensor:
    """Return the logits (B, T, V) of one batch, computed without a key-value cache."""
    device = device or model.device
    ids, mask = batch.input_ids.to(device), batch.mask.long().to(device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def _oblong(batch: Batch) -> Batch:
    """Return the first text of a batch, repeated if it has one token, so that texts and tokens differ in number."""
    rows = 1 if batch.input_ids.shape[1] > 1 else 2
    return Batch(batch.input_ids[:1].repeat(rows, 1), batch.mask[:1].long().repeat(rows, 1))
