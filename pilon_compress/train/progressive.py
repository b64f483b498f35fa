"""Shrinking in steps: each conversion starts from the healed model of the step before (Minitron, Muralidharan et al.,
2024, prunes so), and the teacher is always the dense model at the beginning.

    OUT/stages/0.6/converted -> healed -> dense      the healed model, every composition multiplied out
    OUT/stages/0.4/converted -> healed -> OUT        ratios are over the dense model's size, which `dense` has

A stage that is there is not made again.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pilon_compress.config import conversion
from pilon_compress.config import training as recipes
from pilon_compress.config.model import TernaryConfig
from pilon_compress.config.training import TrainRecipe
from pilon_compress.convert.pipeline import convert
from pilon_compress.convert.prepare import CAUSAL_LENGTH
from pilon_compress.export.run import export
from pilon_compress.io import manifest
from pilon_compress.kernels.gpu_layout import MULTIPLE
from pilon_compress.models import checkpoint
from pilon_compress.results.training import TrainResult
from pilon_compress.train.run import RESULT, STAGES, read_result

log = logging.getLogger(__name__)

LEFT = ("checkpoints", STAGES, "recipe.yaml", "metrics.jsonl", RESULT)  # in the folder of the last stage

Heal = Callable[[TrainRecipe, Path], TrainResult]


def shrink(settings: TrainRecipe, output: Path, heal: Heal, *, command: str = "", quiet: bool = False) -> TrainResult:
    """Convert and heal, ratio by ratio, and leave the last model in `output`, with train.json. Returns its figures.

    `heal(recipe, folder)` is `pipeline.train_model`, going on with a folder that it has begun.
    """
    assert settings.start is not None
    source, results = settings.start, []
    for ratio in settings.shrink:
        folder = output / STAGES / f"{ratio:g}"
        if not quiet:
            log.info("stage %g, from %s", ratio, source)
        results.append(_stage(settings, source, ratio, folder, heal))
        if ratio != settings.shrink[-1] and not (folder / "dense").is_dir():
            export(str(folder / "healed"), folder / "dense", "dense")
        source = str(folder / "dense")
    fields = ("before", "val_perplexity", "val_cosine", "tokens", "seconds")
    whole = {
        "stages": [one.stage(fields, ratio=ratio) for ratio, one in zip(settings.shrink, results, strict=True)],
        "tokens": sum(one.tokens for one in results),
        "seconds": sum(one.seconds for one in results),
        "command": command,
        "recipe": recipes.dump(settings),
        "output": str(output),
    }
    result = results[-1].model_copy(update=whole)
    _move(output / STAGES / f"{settings.shrink[-1]:g}" / "healed", output)
    (output / RESULT).write_text(json.dumps(result.dump(), indent=2))
    manifest.refresh(output)
    return result


def _stage(settings: TrainRecipe, source: str, ratio: float, folder: Path, heal: Heal) -> TrainResult:
    """Convert `source` and heal it; what came of healing."""
    converted, healed = folder / "converted", folder / "healed"
    if not (converted / "report.json").is_file():
        convert(conversion_recipe(settings, source, ratio), converted)
    if (healed / RESULT).is_file():
        return read_result(healed)
    tokens = settings.schedule.tokens
    share = None if tokens is None else max(1, tokens // len(settings.shrink))
    changes: dict[str, Any] = {
        "start": str(converted),
        "teacher": settings.teacher or settings.start,
        "shrink": [],
        "ternary": settings.ternary if ratio == settings.shrink[-1] else TernaryConfig(),
        "schedule": settings.schedule.model_copy(update={"tokens": share}),
    }
    return heal(settings.model_copy(update=changes), healed)


def conversion_recipe(settings: TrainRecipe, source: str, ratio: float) -> conversion.Recipe:
    """The recipe of one conversion: calibrated on the text that healing learns from."""
    calibration: dict[str, Any] = {} if settings.data.source is None else {"data": settings.data.source}
    if checkpoint.is_causal(checkpoint.load_config(source)):
        calibration["sequence_length"] = min(settings.data.sequence_length, CAUSAL_LENGTH)
    return conversion.build(
        {
            "model": source,
            "seed": settings.seed,
            "device": settings.device,
            "budget": {
                "ffn_ratio": ratio,
                "rank_multiple": MULTIPLE if settings.ternary.enabled and ratio < 1 else None,
            },
            "calibration": calibration,
            "evaluation": {"data": "none"},
        }
    )


def _move(healed: Path, output: Path) -> None:
    """Copy the model; config.json comes last, so that a folder which has it is whole."""
    for path in sorted(healed.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name in LEFT:
            continue
        if path.is_dir():
            shutil.copytree(path, output / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, output / path.name)
