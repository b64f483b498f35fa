"""Calibrate the two-sided metric by layer: the measured loss of trimming a layer over the metric's prediction.

The metric takes the errors of different tokens as independent. They are not, least of all just before the output: in
MiniLM's last layer the true loss is five times the predicted one, in the others 1.4 times (docs/log.md). Measuring
each layer once puts their losses on one scale.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pilon_compress.convert.calibrate.second_moments import COPIES
from pilon_compress.data.batch import Batch
from pilon_compress.data.calibration import sequences, tokens
from pilon_compress.io.progress import track
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source
from pilon_compress.nn.functional import kl_divergence, mean_pooled, rows_at_once

PASSES = 1.5  # passes over all of the calibration text that the measurements may cost together
SCORED = 2048  # predictions of a language model, at most: layers are then on one scale to 4 % (docs/log.md)


class Sensitivity:
    """Measures one layer after the other, first to last, on a part of the calibration text.

    What the dense model makes of that text waits in the store; of a language model it is large.
    """

    def __init__(
        self, source: Source, batches: Sequence[Batch], causal: bool, store: TensorStore | None = None
    ) -> None:
        self.source, self.causal, self.store = source, causal, store or TensorStore()
        self.stream = Stream(source, _part(batches, PASSES / (len(source.names) / 2 + 2), causal))
        stream = self.stream.fork()
        for index in track(range(len(source.names)), "reference outputs"):
            with source.block(index) as block:
                stream.advance(block)
        for name, part in self._outputs(stream):
            self.store.put(name, part)

    @torch.no_grad()
    def measure(self, layer: int, change: Callable[[nn.Module], None], predicted: float) -> float:
        """Return true loss ÷ `predicted` loss of a `change`, in place, to a copy of the block of `layer`.

        Layers are measured first to last.
        """
        while self.stream.position < layer:
            self._advance(self.stream, self.stream.position)
        stream = self.stream.fork()
        with self.source.block(layer) as module:
            changed = copy.deepcopy(module)
            change(changed)
            stream.advance(changed)
            self.stream.advance(module)
        while stream.position < len(self.source.names):
            self._advance(stream, stream.position)
        lost = [self._distance(part, self.store.get(name)) for name, part in self._outputs(stream)]
        tokens = sum(int(mask.sum()) for mask in stream.masks)
        true = math.fsum(lost) / tokens
        return true / predicted if predicted > 0 and true > 0 else 1.0

    def _advance(self, stream: Stream, index: int) -> None:
        with self.source.block(index) as block:
            stream.advance(block)

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


def _part(batches: Sequence[Batch], share: float, causal: bool) -> list[Batch]:
    """A `share` of the texts, or as many as make SCORED predictions: the first ones of batches from everywhere."""
    texts = share * sequences(batches)
    if causal:
        texts = min(texts, SCORED * sequences(batches) / tokens(batches))
    largest = max(len(batch.input_ids) for batch in batches)
    count = max(1, round(texts / largest))
    each = max(1, min(largest, round(texts / count)))
    chosen = [batches[round(i * len(batches) / count)] for i in range(count)]
    return [batch.rows(slice(each)) for batch in chosen]
