"""Measure the loss of a complete model whose first blocks were changed, against the dense one."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pilon_compress.convert.calibrate.second_moments import COPIES
from pilon_compress.data.batch import Batch
from pilon_compress.io.progress import track
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source
from pilon_compress.nn.functional import kl_divergence, mean_pooled, rows_at_once


class ModelLoss:
    """The loss on some texts: twice the KL divergence per token, or the squared distance of embeddings per token.

    stream: the texts before the first block; `of` takes forks of it that stand anywhere
    The dense model's outputs wait in the store; those of a language model are large.
    """

    def __init__(
        self, source: Source, batches: Sequence[Batch], causal: bool, store: TensorStore | None = None
    ) -> None:
        self.source, self.causal, self.store = source, causal, store or TensorStore()
        self.stream = Stream(source, batches)
        stream = self.stream.fork()
        for index in track(range(len(source.names)), "reference outputs"):
            with source.block(index) as block:
                stream.advance(block)
        for name, part in self._outputs(stream):
            self.store.put(name, part)

    @torch.no_grad()
    def of(self, stream: Stream) -> float:
        """Return the loss of states that enter block `stream.position`, the blocks from there on being dense."""
        stream = stream.fork()
        while stream.position < len(self.source.names):
            with self.source.block(stream.position) as block:
                stream.advance(block)
        lost = [self._distance(part, self.store.get(name)) for name, part in self._outputs(stream)]
        return math.fsum(lost) / sum(int(mask.sum()) for mask in stream.masks)

    @torch.no_grad()
    def _outputs(self, stream: Stream) -> Iterator[tuple[str, Tensor]]:
        """Log-probabilities (N, V) of every prediction, or unit embeddings (B, d): a few texts at a time, by name."""
        for index, (hidden, mask) in enumerate(zip(stream.hidden, stream.masks, strict=True)):
            if not self.causal:
                states = stream.finish(index, hidden, slice(None), head=False).float()
                yield f"{index}", normalize(mean_pooled(states, mask), dim=1)
                continue
            rows = rows_at_once(hidden.shape[1] * stream.vocab_size, COPIES)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                logits = stream.finish(index, hidden[part], part, head=True)[mask[part]]
                yield f"{index}.{start}", logits.float().log_softmax(-1).to(torch.bfloat16)

    def _distance(self, ours: Tensor, theirs: Tensor) -> float:
        """Twice the KL divergence, summed over tokens, or the squared distance of the embeddings, summed over texts."""
        if not self.causal:
            return float((ours - theirs).square().sum())
        total = 0.0
        rows = rows_at_once(ours.shape[-1], COPIES)
        for a, b in zip(ours.split(rows), theirs.split(rows), strict=True):
            total += 2 * float(kl_divergence(b.float(), a.float()).double().sum())
        return total
