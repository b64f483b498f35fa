"""Changes over a ternary training: the digits of each step, and weight decay, which ends half way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pilon_compress.config.model import TernaryConfig
from pilon_compress.config.training import TrainRecipe
from pilon_compress.nn.part import LatentPart
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.train.heal import teacher_of

CENTRED = 0.1  # share of the way from a latent number to its digit that a training of digits begins with


def centre(model: torch.nn.Module) -> None:
    """Draw the latent numbers of a ternary model, in place, off the edges where they have gathered in training."""
    for module in model.modules():
        if isinstance(module, LatentPart):
            module.centre(CENTRED)


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


def in_stages(recipe: TrainRecipe, tokens: int, folder: Path) -> list[tuple[str, TrainRecipe]]:
    """Return healing to ternary weights as runs, each with its name, which start from `folder`/NAME of the one before.

    float      the float factors heal                                `ternary.after` of all `tokens`
    blocks     they are rounded and fitted block by block            `ternary.blocks`
    ternary    the whole model learns, straight through its digits   what the others leave
    scales     the ternary weights stay, their scales learn          `ternary.scales`

    Runs of no tokens are left out. Each sees the text in another order, so that none begins with the same part.
    """
    asked = recipe.ternary
    last = 1 - asked.after - asked.blocks - asked.scales
    shares = {"float": asked.after, "blocks": asked.blocks, "ternary": last, "scales": asked.scales}
    found: list[tuple[str, TrainRecipe]] = []
    left = tokens
    names = [name for name, share in shares.items() if share > 1e-9]
    for name in names:
        count = left if name == names[-1] else max(1, round(tokens * shares[name]))
        left = max(1, left - count)
        alone = {one: float(one == name) for one in ("blocks", "scales")}
        changes: dict[str, Any] = {
            "teacher": teacher_of(recipe),
            "seed": (recipe.seed + len(found)) % 2**32,
            "schedule": recipe.schedule.model_copy(update={"tokens": count}),
        }
        if name == "float":
            changes["ternary"] = TernaryConfig()
        else:
            changes["ternary"] = asked.model_copy(update={"after": 0.0, **alone})
        if name == "scales":
            changes["run"] = recipe.run.model_copy(update={"train": "compositions"})
        if found:
            changes["start"] = str(folder / found[-1][0])
        found.append((name, recipe.model_copy(update=changes)))
    return found
