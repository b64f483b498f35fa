"""Calibrate the two-sided metric by block: the measured loss of trimming a block over the metric's prediction.

The metric takes the errors of different tokens as independent. They are not, least of all just before the output: in
MiniLM's last layer the true loss is five times the predicted one, in the others 1.4 times (docs/log.md). Measuring
each block once, feed-forward and attention, puts their losses on one scale.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from pilon_compress.convert.calibrate.model_loss import ModelLoss
from pilon_compress.data.batch import Batch
from pilon_compress.data.calibration import sequences, tokens
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.source import Source

PASSES = 1.5  # passes over all of the calibration text that the measurements may cost together
SCORED = 2048  # predictions of a language model, at most: layers are then on one scale to 4 % (docs/log.md)


class Change(NamedTuple):
    """A change to a copy of a transformer block, made in place, and the loss that the metric predicts for it."""

    make: Callable[[nn.Module], None]
    predicted: float


class Sensitivity:
    """Measures one layer after the other, first to last, on a part of the calibration text.

    What the dense model makes of that text waits in the store; of a language model it is large.
    """

    def __init__(
        self, source: Source, batches: Sequence[Batch], causal: bool, store: TensorStore | None = None
    ) -> None:
        self.source = source
        self.loss = ModelLoss(source, _part(batches, PASSES / (len(source.names) / 2 + 2), causal), causal, store)
        self.stream = self.loss.stream

    @torch.no_grad()
    def measure(self, layer: int, changes: Sequence[Change]) -> list[float]:
        """Return true loss ÷ predicted loss of each of the `changes` to the transformer block of `layer`, by itself.

        Layers are measured first to last.
        """
        while self.stream.position < layer:
            with self.source.block(self.stream.position) as block:
                self.stream.advance(block)
        behind = []
        with self.source.block(layer) as module:
            for change in changes:
                changed, stream = copy.deepcopy(module), self.stream.fork()
                change.make(changed)
                stream.advance(changed)
                behind.append(stream)
            self.stream.advance(module)
        return [_scale(self.loss.of(stream), change.predicted) for stream, change in zip(behind, changes, strict=True)]


def _scale(true: float, predicted: float) -> float:
    return true / predicted if predicted > 0 and true > 0 else 1.0


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
