"""Models from scratch that begin dense: converted on the way, once there is something to convert.

Full-rank warm-up (Pufferfish, Wang et al., 2021), with our conversion in the place of its plain SVD.

    OUT/stages/dense -> OUT/stages/converted -> OUT      shares of one budget of tokens and of one schedule

A stage that is there is not made again.
"""

from pathlib import Path
from typing import Any

from pilon_compress.config import conversion
from pilon_compress.config.model import FfnConfig, HostConfig, TernaryConfig
from pilon_compress.config.training import TrainRecipe
from pilon_compress.config.training_sections import Distill
from pilon_compress.convert.pipeline import convert
from pilon_compress.train.progressive import conversion_recipe

SAMPLES = 128  # sequences that the conversion is calibrated on
WARMUP, DECAY = 0.03, 0.4  # shares of what is left, after the conversion


def convert_once(settings: TrainRecipe, folder: Path) -> None:
    """Convert `folder`/dense to `folder`/converted, unless that is done."""
    if not (folder / "converted" / "report.json").is_file():
        convert(converting(settings, str(folder / "dense")), folder / "converted")


def stages(settings: TrainRecipe, folder: Path) -> tuple[TrainRecipe, TrainRecipe]:
    """The recipe up to the conversion, and the one behind it: its schedule cut in two, another order of the text."""
    share, whole = settings.ffn.dense_until, settings.schedule
    assert whole.tokens is not None
    early = {"tokens": max(1, round(share * whole.tokens)), "warmup": min(1.0, whole.warmup / share)}
    late = {"tokens": max(1, round((1 - share) * whole.tokens)), "warmup": WARMUP}
    if whole.kind == "wsd":
        early["decay"], late["decay"] = 0.0, DECAY
    plain = {"ffn": FfnConfig(kind="dense"), "ternary": TernaryConfig(), "schedule": whole.model_copy(update=early)}
    first = settings.model_copy(update=plain)
    rate = settings.optimizer.learning_rate * settings.ffn.dense_after
    changes: dict[str, Any] = {
        "task": "heal",
        "start": str(folder / "converted"),
        "teacher": str(folder / "dense"),
        "seed": (settings.seed + 1) % 2**32,
        "host": HostConfig(),
        "ffn": FfnConfig(),
        "optimizer": settings.optimizer.model_copy(update={"learning_rate": rate, "banks": 1.0, "compositions": 1.0}),
        "schedule": whole.model_copy(update=late),
        "distill": Distill(kl=0.0, next_token=1.0, hidden=0.0, keep_best=False),
    }
    return first, settings.model_copy(update=changes)


def converting(settings: TrainRecipe, dense: str) -> conversion.Recipe:
    """The recipe of the conversion: the budget of `ffn`, calibrated on the text of the training."""
    found = conversion_recipe(settings, dense, settings.ffn.ffn_ratio)
    budget = found.budget.model_copy(update={"mac_ratio": settings.ffn.macs})
    calibration = found.calibration.model_copy(update={"samples": SAMPLES})
    return found.model_copy(update={"budget": budget, "calibration": calibration})
