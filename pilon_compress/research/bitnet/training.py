"""BitNet's training: what a recipe's section `research.bitnet` adds to a run."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.models.families import Site
from pilon_compress.models.layouts import dense_layout
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.part import LatentPart
from pilon_compress.nn.ternary_quantizer import rounded
from pilon_compress.optimize import callbacks
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.research.bitnet.settings import Settings


class GradualRounding(nn.Module):
    """Rounding that takes hold little by little: x + strength · (rounded x - x), in training alone."""

    strength: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("strength", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, limit: int) -> Tensor:
        """Return `x` moved towards its rounding by `strength`, of the shape of `x`."""
        return torch.lerp(x, rounded(x, limit), self.strength.to(x.dtype))


class RoundingSchedule(Callback):
    """Sets the strength of every rounding before each step: 0 at the start, 1 from `warmup` of the training on."""

    def __init__(self, roundings: Sequence[GradualRounding], warmup: float) -> None:
        self.roundings, self.warmup = roundings, warmup

    def before(self, step: int, share: float) -> None:
        """Set the strength for a step at `share` of the training."""
        for rounding in self.roundings:
            rounding.strength.fill_(min(1.0, share / self.warmup))


class SecondStage(Callback):
    """Multiplies the learning rates from `second` of the training on (BitNet b1.58, Ma et al., 2024)."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], second: float, rate: float) -> None:
        self.optimizers, self.second, self.rate = optimizers, second, rate

    def before(self, step: int, share: float) -> None:
        """Scale the learning rates of a step that is in the second stage."""
        if share >= self.second:
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] *= self.rate


class Extension(callbacks.Extension):
    """Norms in the layout, gradual rounding of ternary parts, rates of a second stage."""

    asked: Settings

    def layout(self, layout: Layout | None, sites: Sequence[Site]) -> Layout | None:
        """Return the layout with a norm before every down projection, if it is asked for."""
        if not self.asked.sub_norm:
            return layout
        down = [site.name for site in sites if site.role == "down"]
        return (layout or dense_layout(sites)).with_addition("bitnet", "sub_norm", down)

    def stage(self, model: PreTrainedModel) -> None:
        """Give ternary parts a gradual rounding, if a warm-up is asked for."""
        if self.recipe.ternary.enabled and self.asked.warmup:
            for part in model.modules():
                if isinstance(part, LatentPart):
                    part.rounding = GradualRounding()

    def callbacks(
        self, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], steps: int
    ) -> list[Callback]:
        """Return the callbacks for the warm-up of rounding and the second stage of rates."""
        found: list[Callback] = []
        roundings = [module for module in model.modules() if isinstance(module, GradualRounding)]
        if roundings:
            found.append(RoundingSchedule(roundings, self.asked.warmup))
        if self.recipe.ternary.enabled and self.asked.second_rate != 1:
            found.append(SecondStage(optimizers, self.asked.second, self.asked.second_rate))
        return found
