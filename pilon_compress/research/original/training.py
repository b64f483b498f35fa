"""The original PILON's training: what a recipe's section `research.original` adds to a run."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pilon_compress.models.families import Site
from pilon_compress.nn.layout import Layout
from pilon_compress.optimize import callbacks
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.research.original.moving_linear import staged
from pilon_compress.research.original.rates import RateSchedule
from pilon_compress.research.original.selection import SelectionSchedule, stage
from pilon_compress.research.original.settings import Settings, Staged


class Extension(callbacks.Extension):
    """Latent options in the layout; projections whose selection or size moves; rates by phase."""

    asked: Settings

    def layout(self, layout: Layout | None, sites: Sequence[Site]) -> Layout | None:
        """Return the layout with latent scales and biases in every bank, if they are asked for."""
        for kind in ("latent_scale", "latent_bias"):
            if layout is not None and getattr(self.asked, kind):
                layout = layout.with_addition("original", kind, layout.banks)
        return layout

    def stage(self, model: PreTrainedModel) -> None:
        """Replace the projections of `model` by those that the schedules need."""
        stage(model, self.asked, self.recipe.seed)

    def callbacks(
        self, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], steps: int
    ) -> list[Callback]:
        """Return the callbacks for selection and rates that are asked for."""
        found: list[Callback] = []
        if any(staged(model)):
            found.append(SelectionSchedule(model, self.asked, self.recipe.seed, steps))
        if self.asked.staged != Staged():
            found.append(RateSchedule(model, self.asked.staged, optimizers))
        return found
