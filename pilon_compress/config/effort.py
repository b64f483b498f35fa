"""Levels of `effort`: calibration text, sweeps of joint fits, and the order of the layers' fits."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Text and time that a conversion spends.

    sequential   layers are fitted behind the converted ones before them
    sweeps       of a joint fit
    paragraphs   that calibrate an encoder
    per_neuron   tokens per inner neuron that calibrate a causal LM (docs/results/conversion.md), in `blocks` at least
    """

    sequential: bool
    sweeps: int
    paragraphs: int
    per_neuron: int
    blocks: int

    def samples(self, causal: bool, neurons: int, length: int) -> int:
        """Calibration sequences, of `length` tokens in a causal LM, whose widest layer has so many `neurons`."""
        return max(self.blocks, math.ceil(self.per_neuron * neurons / length)) if causal else self.paragraphs


EFFORTS = {
    "fast": Effort(sequential=False, sweeps=12, paragraphs=256, per_neuron=4, blocks=16),
    "balanced": Effort(sequential=True, sweeps=24, paragraphs=800, per_neuron=8, blocks=32),
    "best": Effort(sequential=True, sweeps=64, paragraphs=1600, per_neuron=32, blocks=128),
}
