"""Select primitives and components: selections that explore, and schedules of their numbers.

    anneal          all primitives, then fewer and fewer: the ones that contribute most stay
    noise, gumbel   the top k of learned scores, disturbed less and less (Gumbel top-k: Kool et al., 2019)
    staged          top_k, n_primitives and rank as the recipe's phases say; softmax selections kept for some steps

Every choice is a function of the seed, the step and the weights, and stands in buffers: a resumed run goes on alike.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pilon_compress.errors import BadInput
from pilon_compress.nn.additions import carry
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.installed import projections
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.optimize.schedule import fade
from pilon_compress.research.original.moving_linear import StagedLinear, staged
from pilon_compress.research.original.settings import Settings, Staged


def stage(model: Any, settings: Settings, seed: int) -> None:
    """Put a StagedLinear in the place of every projection that `settings` let change. Raises BadInput."""
    asked, explore = settings.staged, settings.selection.explore
    moving = bool(asked.top_k or asked.n_primitives)
    generator = torch.Generator().manual_seed(seed)
    for name, plain in list(projections(model)):
        softmax = plain.composition == "softmax"
        if softmax and explore != "none":
            raise BadInput("research.original.selection.explore is for component and scalar compositions, not softmax")
        explored = explore != "none" and plain.top_k < plain.bank.n_primitives
        if moving and not softmax and explore == "none":
            raise BadInput(
                "research.original.staged: top_k and n_primitives need composition softmax, or selection.explore"
            )
        _check_ends(name, plain, asked)
        if not (explored or asked.rank or (softmax and (moving or asked.cache_top_k > 1))):
            continue
        most = max([plain.top_k, *asked.top_k]) if softmax else plain.top_k
        candidates = plain.bank.n_primitives if explored else min(most, plain.bank.n_primitives)
        layer = StagedLinear(plain, candidates, explored, explored and explore != "anneal", generator)
        model.base_model.set_submodule(name, carry(plain, layer).train(plain.training))


def _check_ends(name: str, plain: ComposedLinear, asked: Staged) -> None:
    """A schedule must end at the model's own size."""
    own = {"top_k": plain.top_k, "rank": plain.bank.rank, "n_primitives": plain.bank.n_primitives}
    for field, size in own.items():
        values = getattr(asked, field)
        if values and values[-1] != size:
            raise BadInput(
                f"research.original.staged.{field} ends at {values[-1]}, but {name} has {size}: set ffn.{field} as well"
            )


def ramp(share: float, ends: Sequence[float], values: Sequence[int]) -> int:
    """A number after `share` of the training: the first value up to the first end, straight lines between the ends."""
    return round(float(np.interp(share, ends, values)))


class SelectionSchedule(Callback):
    """Chooses before each step. `steps`: of the whole training."""

    def __init__(self, model: Any, settings: Settings, seed: int, steps: int) -> None:
        self.layers = [layer for _, layer in staged(model)]
        self.asked, self.explored, self.seed, self.steps = settings.staged, settings.selection, seed, steps
        asked = settings.staged
        moving = [_constant_from(asked.phases, values) for values in (asked.top_k, asked.n_primitives)]
        self.final = math.ceil(max(self.explored.until, *moving) * steps)

    def before(self, step: int, share: float) -> None:
        """Choose the primitives of every explored layer for a step at `share` of the training."""
        noise = torch.Generator().manual_seed((self.seed << 31) ^ step)
        for layer in self.layers:
            if layer.explored and step <= self.final:
                self._choose(layer, share, self._disturbance(layer, share, noise))
            if layer.explored:
                layer.open.fill_(float(step < self.final))
                layer.width = len(layer.selected) if step < self.final else layer.top_k
            elif layer.chooses and self._due(layer, step, share):
                self._choose(layer, share, None)
            if self.asked.rank:
                active = ramp(share, self.asked.phases, self.asked.rank)
                layer.components.zero_()
                layer.components[:active] = 1

    def _choose(self, layer: StagedLinear, share: float, disturbance: Tensor | None) -> None:
        scores = layer.scores()
        if disturbance is not None:
            scores = scores + disturbance.to(scores.device)
        layer.choose(scores, *self._numbers(layer, share))

    def _numbers(self, layer: StagedLinear, share: float) -> tuple[int, int]:
        """(primitives that a layer selects, primitives of the bank in use)."""
        asked, n = self.asked, layer.bank.n_primitives
        among = ramp(share, asked.phases, asked.n_primitives) if asked.n_primitives else n
        if asked.top_k:
            return min(ramp(share, asked.phases, asked.top_k), len(layer.selected)), among
        if layer.explored and self.explored.explore == "anneal":
            left = fade(share, self.explored.until)
            return layer.top_k + round((n - layer.top_k) * left), among
        return layer.top_k, among

    def _disturbance(self, layer: StagedLinear, share: float, generator: torch.Generator) -> Tensor | None:
        """Noise on the scores (n,): drawn for each layer in turn, on every process alike."""
        if layer.gate is None:
            return None
        scale = self.explored.temperature * fade(share, self.explored.until)
        n = layer.bank.n_primitives
        if self.explored.explore == "noise":
            return scale * torch.randn(n, generator=generator)
        uniform = torch.rand(n, generator=generator).clamp(1e-9, 1 - 1e-7)
        return -scale * torch.log(-torch.log(uniform))

    def _due(self, layer: StagedLinear, step: int, share: float) -> bool:
        """Return True if a softmax selection is due: every few steps, and whenever its numbers change."""
        before = max(0, step - 1) / self.steps
        return step % self.asked.cache_top_k == 0 or self._numbers(layer, share) != self._numbers(layer, before)


def _constant_from(ends: Sequence[float], values: Sequence[int]) -> float:
    """The end from which a schedule stays at its last value; 0 where there is none."""
    if not values:
        return 0.0
    return next(end for i, end in enumerate(ends) if all(value == values[-1] for value in values[i:]))
