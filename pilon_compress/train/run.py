"""A run and its output folder: begun once, and gone on with under the same recipe only."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilon_compress.deploy.save import check_output
from pilon_compress.errors import BadInput
from pilon_compress.train import recipe as recipes
from pilon_compress.train.distributed import World
from pilon_compress.train.recipe import TrainRecipe

RECIPE, RESULT = "recipe.yaml", "train.json"
STAGES = "stages"  # folder of runs that come before, inside the output


@dataclass
class Run:
    """One stretch of training: what it is asked for, and where it goes."""

    recipe: TrainRecipe
    output: Path
    world: World
    command: str
    quiet: bool
    whole: TrainRecipe | None = None
    """What the user asked for, where `recipe` is a stage of it."""
    stages: tuple[dict[str, Any], ...] = ()
    """What came of the stages before."""

    @property
    def asked(self) -> TrainRecipe:
        return self.whole or self.recipe


def claim(run: Run, resume: bool, overwrite: bool) -> bool:
    """Make the output folder ours, with the recipe in it; or find the run that it holds, if that is to go on.

    Whether it is a new one.
    """
    output, mark = run.output, run.output / RECIPE
    begun = resume and mark.is_file()
    if begun:
        before = recipes.load(str(mark))
        if difference := changed(before, run.recipe):
            raise BadInput(f"{output} was begun with another {difference}: resume with the same recipe, or start anew")
    elif not resume or (output.exists() and any(output.iterdir())):
        check_output(output, overwrite, run.recipe.start or "")
    run.world.wait()
    if begun or not run.world.first:
        run.world.wait()
        return not begun
    if output.exists() and overwrite:
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    mark.write_text(recipes.dump(run.recipe))
    run.world.wait()
    return True


def changed(before: TrainRecipe, now: TrainRecipe) -> str | None:
    """The first field in which two recipes differ; how the work is done may differ, as long as batches are the same."""
    free = {"batch_size", "train"}
    for name, old in before.model_dump(mode="json").items():
        new = now.model_dump(mode="json")[name]
        if name == "device" or old == new:
            continue
        if not isinstance(old, dict):
            return name
        keys = [key for key in old if old[key] != new[key] and not (name == "run" and key not in free)]
        if keys:
            return f"{name}.{keys[0]} ({old[keys[0]]}, now {new[keys[0]]})"
    return None
