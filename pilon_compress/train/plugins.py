"""Everything that changes over a training besides the learning rates, as the recipe asks for it."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pilon_compress.form.layout import projections
from pilon_compress.train.loop import Plugin
from pilon_compress.train.masking import UnusedStay
from pilon_compress.train.recipe import Staged, TrainRecipe
from pilon_compress.train.selection import Choosing
from pilon_compress.train.staged import Stages
from pilon_compress.train.staged_linear import StagedLinear, staged
from pilon_compress.train.ternary import Rounding


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
