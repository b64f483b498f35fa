"""Callbacks of the training loop, and what a research module adds to a training.

A recipe's section `research: {NAME: ...}` binds class `Extension` of `pilon_compress.research.NAME.training`. State
that checkpoints must hold goes into buffers of the model: they are saved and restored with it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.config.research import bound
from pilon_compress.config.training import TrainRecipe
from pilon_compress.models.families import Site
from pilon_compress.nn.layout import Layout


class Callback(Protocol):
    """A change over the training besides the learning rates of its schedule: selections, stages, masks."""

    def before(self, step: int, share: float) -> None:
        """Act before the forward pass of `step`, at `share` (0 to 1) of the training."""
        return None

    def penalty(self) -> Tensor | None:
        """Return a term that is added to the loss, once per step."""
        return None

    def batch_penalty(self) -> Tensor | None:
        """Return a term that is added to the loss of each micro batch, after its forward pass: a mean over tokens."""
        return None

    def around(self) -> Any:
        """Return a context manager around the optimiser's step."""
        return nullcontext()


class Extension:
    """The additions of a research module to a training; modules override what they need.

    `asked`: their section of the recipe, an instance of their own `Settings`.
    """

    def __init__(self, asked: Any, recipe: TrainRecipe) -> None:
        self.asked, self.recipe = asked, recipe

    def layout(self, layout: Layout | None, sites: Sequence[Site]) -> Layout | None:
        """Return the layout of a model from scratch, None of a dense one, with what the section adds to it."""
        return layout

    def stage(self, model: PreTrainedModel) -> None:
        """Change the model, in place, before it trains. Raises BadInput where the section does not fit it."""

    def callbacks(
        self, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], steps: int
    ) -> Sequence[Callback]:
        """Callbacks, in the order in which they act; they may regroup the optimisers. Raises BadInput."""
        return ()


def extensions(recipe: TrainRecipe) -> list[Extension]:
    """The extensions of every research module that the recipe names."""
    named = recipe.research.sections.items()
    return [bound(name, "training").Extension(section, recipe) for name, section in named]
