"""Choose one price limit for all gates on held-out text, so that the perplexity of the model with all of them holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.data.batch import IGNORED, Batch
from pilon_compress.distill.losses import NextToken
from pilon_compress.io.progress import track
from pilon_compress.nn.exits import gated_blocks
from pilon_compress.nn.skipping import SkipCount, counting
from pilon_compress.nn.specs import NEVER

LOOKS = 8  # passes over the held-out text, besides the one without skipping
ENOUGH = 0.9  # share of the allowed increase at which the search ends
AIM = 0.95  # share of the allowed increase that the next limit is to reach


@dataclass(frozen=True)
class Measured:
    """A threshold with the perplexity increase and the share of skipped work that it was measured to have."""

    threshold: float
    increase: float
    skipped: float
    by_layer: list[float]


class Held:
    """Held-out batches, on which a model is run with one threshold for all gates."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model, self.batches, self.loss = model, batches, NextToken(model)
        self.without = self._run(NEVER)[0]

    @property
    def perplexity(self) -> float:
        """Perplexity where no token skips."""
        return math.exp(self.without)

    def at(self, threshold: float) -> Measured:
        """Run the model with that threshold, which its gates keep."""
        nats, count = self._run(threshold)
        return Measured(threshold, math.expm1(nats - self.without), count.share, count.by_layer)

    @torch.no_grad()
    def _run(self, threshold: float) -> tuple[float, SkipCount]:
        set_threshold(self.model, threshold)
        total = 0.0
        with counting(self.model) as count:
            for batch in track(self.batches, "held-out text"):
                batch = batch.to(self.model.device)
                total += float(self.loss(batch.inputs(), batch.targets))
                count.take(batch.targets != IGNORED)
        return total / count.tokens, count


def set_threshold(model: PreTrainedModel, threshold: float) -> None:
    """Let tokens skip, at every gate, whose predicted log price is below `threshold`."""
    for _, block in gated_blocks(model):
        block.exit_gate.threshold = threshold


def choose(held: Held, scores: Tensor, allowed: float) -> Measured:
    """Return the limit of the largest skipped share whose increase is at most `allowed`; the gates have it.

    scores: predicted log prices (blocks, N). A limit promises a price, the sum of the predicted prices below it; the
    promise that is kept is measured, and the next one is scaled by what the last one turned out to cost.
    """
    logs = scores.flatten().double().sort().values
    promised = logs.exp().cumsum(0) / scores.shape[1]  # nats per token, of everything up to a price
    best, low, high = Measured(NEVER, 0.0, 0.0, [0.0] * len(scores)), 0, len(logs)
    aim = math.log1p(allowed)
    place = int(torch.searchsorted(promised, aim / 2))
    for _ in range(LOOKS):
        place = min(max(place, low + 1), high - 1) if high - low > 1 else low
        if place <= low:
            break
        found = held.at(float(logs[place]))
        if found.increase <= allowed:
            best, low = max(best, found, key=lambda one: one.skipped), place
        else:
            high = place
        if ENOUGH * allowed <= found.increase <= allowed or low >= len(logs) - 1:
            break
        scale = AIM * aim / max(math.log1p(max(found.increase, 0.0)), aim / 8)
        place = int(torch.searchsorted(promised, float(promised[place]) * scale))
        if not low < place < high:
            place = (low + high) // 2
    set_threshold(held.model, best.threshold)
    return best
