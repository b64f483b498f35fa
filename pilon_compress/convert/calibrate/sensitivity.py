"""Calibrate the two-sided metric by layer: the measured loss of trimming a layer over the metric's prediction.

The metric takes the errors of different tokens as independent. They are not, least of all just before the output: in
MiniLM's last layer the true loss is five times the predicted one, in the others 1.4 times (docs/log.md). Measuring
each layer once puts their losses on one scale.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pilon_compress.convert.calibrate.model_loss import ModelLoss
from pilon_compress.data.batch import Batch
from pilon_compress.data.calibration import sequences, tokens
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.source import Source

PASSES = 1.5  # passes over all of the calibration text that the measurements may cost together
SCORED = 2048  # predictions of a language model, at most: layers are then on one scale to 4 % (docs/log.md)


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
    def measure(self, layer: int, change: Callable[[nn.Module], None], predicted: float) -> float:
        """Return true loss ÷ `predicted` loss of a `change`, in place, to a copy of the block of `layer`.

        Layers are measured first to last.
        """
        while self.stream.position < layer:
            with self.source.block(self.stream.position) as block:
                self.stream.advance(block)
        stream = self.stream.fork()
        with self.source.block(layer) as module:
            changed = copy.deepcopy(module)
            change(changed)
            stream.advance(changed)
            self.stream.advance(module)
        true = self.loss.of(stream)
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
