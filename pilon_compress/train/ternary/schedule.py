"""Changes over a ternary training: the digits of each step, and weight decay, which ends half way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pilon_compress.config.model import TernaryConfig
from pilon_compress.config.training import TrainRecipe
from pilon_compress.config.training_sections import Schedule
from pilon_compress.nn.part import LatentPart
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.train.heal import teacher_of


class Rounding(Callback):
    """Makes the digits of banks and dense matrices once before each step, for all layers and micro batches.

    Parts that are sharded make theirs when they are gathered. Only buffers change: all steps are one graph.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        recipe: TrainRecipe,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.parts, self.ends = parts, recipe.weight_decay_ends
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    @classmethod
    def of(cls, model: Any, recipe: TrainRecipe, optimizers: Sequence[torch.optim.Optimizer]) -> "Rounding | None":
        """The callback, where the model has parts that round in training."""
        parts = [module for module in model.modules() if isinstance(module, LatentPart)]
        return cls(parts, recipe, optimizers) if parts else None

    def before(self, step: int, share: float) -> None:
        """Make the digits of a step, and end weight decay once its share has come."""
        for part in self.parts:
            part.train()  # whatever the rest does: healing runs without dropout, hence in evaluation mode
            if not isinstance(next(part.parameters()), DTensor):
                part.hold()
        if share >= self.ends:
            for group in self.groups:
                group["weight_decay"] = 0.0


def in_stages(recipe: TrainRecipe, tokens: int, floats: Path) -> tuple[TrainRecipe, TrainRecipe]:
    """Healing in digits as two runs: of the float factors, whose model goes to the folder `floats`, and from there on.

    `tokens`: of both. The second run sees the text in another order, so that it does not begin with the same part.
    """
    share = max(1, round(tokens * recipe.ternary.after))
    teacher = teacher_of(recipe)
    first = {"teacher": teacher, "ternary": TernaryConfig(), "schedule": _lasting(recipe, share)}
    second = {
        "teacher": teacher,
        "start": str(floats),
        "seed": (recipe.seed + 1) % 2**32,
        "schedule": _lasting(recipe, max(1, tokens - share)),
    }
    return recipe.model_copy(update=first), recipe.model_copy(update=second)


def _lasting(recipe: TrainRecipe, tokens: int) -> Schedule:
    return recipe.schedule.model_copy(update={"tokens": tokens})
