"""Models from scratch that begin dense: converted on the way, once there is something to convert.

Full-rank warm-up (Pufferfish, Wang et al., 2021), with our conversion in the place of its plain SVD.

    OUT/stages/dense -> converted -> rest -> OUT      shares of one budget of tokens and of one schedule

A stage that is there is not made again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pilon_compress import recipe
from pilon_compress.convert.pipeline import convert
from pilon_compress.train import recipe as recipes
from pilon_compress.train.recipe import Distill, Ffn, Ternary, TrainRecipe
from pilon_compress.train.shrink import RESULT, STAGES, Heal, conversion, move

SAMPLES = 128  # sequences that the conversion is calibrated on
WARMUP, DECAY = 0.03, 0.4  # shares of what is left, after the conversion


def begin_dense(
    settings: TrainRecipe, output: Path, train: Heal, *, command: str = "", quiet: bool = False
) -> dict[str, Any]:
    """Train dense, convert, train on, and leave the model in `output`, with train.json. Returns its contents.

    `train(recipe, folder)` is `pipeline.train_model`, going on with a folder that it has begun.
    """
    folder = output / STAGES
    first, second = stages(settings, folder)
    dense = _once(train, first, folder / "dense")
    if not (folder / "converted" / "report.json").is_file():
        convert(converting(settings, str(folder / "dense")), folder / "converted")
    if not quiet:
        print(f"dense so far, perplexity {dense['val_perplexity']:.4g}; converted, and on", file=sys.stderr)
    rest = _once(train, second, folder / "rest")
    told = ("before", "val_perplexity", "tokens", "seconds")
    result = {
        **{name: value for name, value in rest.items() if name not in ("teacher", "teacher_model", "perplexity_ratio")},
        "task": settings.task,
        "stages": [{name: one[name] for name in told if name in one} for one in (dense, rest)],
        "tokens": dense["tokens"] + rest["tokens"],
        "seconds": dense["seconds"] + rest["seconds"],
        "command": command,
        "recipe": recipes.dump(settings),
        "output": str(output),
    }
    move(folder / "rest", output)
    (output / RESULT).write_text(json.dumps(result, indent=2))
    return result


def _once(train: Heal, stage: TrainRecipe, folder: Path) -> dict[str, Any]:
    if not (folder / RESULT).is_file():
        return train(stage, folder)
    found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return found


def stages(settings: TrainRecipe, folder: Path) -> tuple[TrainRecipe, TrainRecipe]:
    """The recipe up to the conversion, and the one behind it: its schedule cut in two, another order of the text."""
    share, whole = settings.ffn.dense_until, settings.schedule
    assert whole.tokens is not None
    early = {"tokens": max(1, round(share * whole.tokens)), "warmup": min(1.0, whole.warmup / share), "decay": 0.0}
    late = {"tokens": max(1, round((1 - share) * whole.tokens)), "warmup": WARMUP, "decay": DECAY}
    plain = {"ffn": Ffn(kind="dense"), "ternary": Ternary(), "schedule": whole.model_copy(update=early)}
    first = settings.model_copy(update=plain)
    rate = settings.optimizer.learning_rate * settings.ffn.dense_after
    changes: dict[str, Any] = {
        "task": "heal",
        "start": str(folder / "converted"),
        "teacher": str(folder / "dense"),
        "seed": (settings.seed + 1) % 2**32,
        "ffn": Ffn(),
        "optimizer": settings.optimizer.model_copy(update={"learning_rate": rate, "banks": 1.0, "compositions": 1.0}),
        "schedule": whole.model_copy(update=late),
        "distill": Distill(kl=0.0, next_token=1.0, hidden=0.0, keep_best=False),
    }
    return first, settings.model_copy(update=changes)


def converting(settings: TrainRecipe, dense: str) -> recipe.Recipe:
    """The recipe of the conversion: the budget of `ffn`, calibrated on the text of the training."""
    found = conversion(settings, dense, settings.ffn.ffn_ratio)
    budget = found.budget.model_copy(update={"mac_ratio": settings.ffn.mac_ratio})
    calibration = found.calibration.model_copy(update={"samples": SAMPLES})
    return found.model_copy(update={"budget": budget, "calibration": calibration})
