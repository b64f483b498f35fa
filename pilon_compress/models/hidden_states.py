"""Carry the hidden states of every batch through the blocks of a model, one block at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pilon_compress.data.batch import Batch
from pilon_compress.models.block_call import hidden_of
from pilon_compress.models.forward import last_states, run_head
from pilon_compress.models.recording import Recording, standing_in
from pilon_compress.models.source import Source
from pilon_compress.models.task import text_config


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

    def __init__(self, source: Source, batches: Sequence[Batch], begun: "Stream | None" = None) -> None:
        """Start before the first block, or with the states of `begun`, another stream of the same batches.

        Raises BadInput for an architecture that does not call each block once, in order, on states (B, T, d).
        """
        self.source, self.batches = source, batches
        self.model, self.device, self.names = source.model, source.device, source.names
        if begun is None:
            self._recording, entered = Recording.of(source, batches)
            self.position, self.hidden = 0, [self.turned(states) for states in entered]
        else:  # states are never changed in place, so no tensor is copied
            self._recording = begun._recording
            self.position, self.hidden = begun.position, list(begun.hidden)
        self.masks = [batch.mask.to(self.device) for batch in batches]
        self.block_masks = [mask.T if self.time_first else mask for mask in self.masks]

    @property
    def time_first(self) -> bool:
        """True if the blocks lay states out as (T, B, d)."""
        return self._recording.time_first

    def fork(self) -> "Stream":
        """Return a second stream at the same position."""
        return Stream(self.source, self.batches, self)

    def turned(self, hidden: Tensor) -> Tensor:
        """Turn states (B, T, d) into the layout of the blocks, or back."""
        return hidden.transpose(0, 1) if self.time_first else hidden

    @property
    def vocab_size(self) -> int:
        """Return the number of logits of a language model."""
        size: int = text_config(self.model.config).vocab_size
        return size

    def call(self, block: nn.Module, index: int, hidden: Tensor, position: int | None = None) -> Tensor:
        """Run `block` as that of `position` (default: the stream's) on states `hidden` (B, T, d) of batch `index`."""
        call = self._recording.calls[index][self.position if position is None else position]
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
        output = self._recording.results[index].filled(self.turned(hidden))
        with standing_in(self.model, lambda _: lambda *args, **kwargs: output):
            return run_head(self.model, part, self.device) if head else last_states(self.model, part, self.device)
