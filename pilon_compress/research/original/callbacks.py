"""Everything that changes over a training besides the learning rates, as the recipe asks for it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pilon_compress.config.training import Staged, TrainRecipe
from pilon_compress.nn.layout import projections
from pilon_compress.research.original.freeze_unused import UnusedStay
from pilon_compress.research.original.moving_linear import StagedLinear, staged
from pilon_compress.research.original.rates import Stages
from pilon_compress.research.original.selection import Choosing
from pilon_compress.train.loop import Plugin
from pilon_compress.train.ternary.schedule import Rounding


def plugins_for(
    recipe: TrainRecipe, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer], steps: int
) -> list[Plugin]:
    """In the order in which they act before each step. Raises BadInput for schedules that do not fit the model."""
    found: list[Plugin] = []
    if any(staged(model)):
        found.append(Choosing(model, recipe, steps))
    if recipe.staged != Staged():
        found.append(Stages(model, recipe.staged, optimizers))
    if rounding := Rounding.of(model, recipe, optimizers):
        found.append(rounding)
    if any(isinstance(layer, StagedLinear) or layer.composition == "softmax" for _, layer in projections(model)):
        found.append(UnusedStay(model))
    return found
