"""A run and its output folder: begun once, and gone on with under the same recipe only."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilon_compress.config import training as recipes
from pilon_compress.config.training import TrainRecipe
from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.disk import part_of, write_atomic
from pilon_compress.io.folders import discard_old, open_output, put_back, set_aside
from pilon_compress.io.output_paths import check_output
from pilon_compress.parallel import World
from pilon_compress.results.training import TrainResult

RECIPE, RESULT = "recipe.yaml", "train.json"
STAGES = "stages"  # folder of runs that come before, inside the output


@dataclass
class Run:
    """A training: its recipe and its output."""

    recipe: TrainRecipe
    output: Path
    world: World
    command: str
    quiet: bool
    whole: TrainRecipe | None = None
    """Recipe of the user, where `recipe` is a stage of it."""
    stages: tuple[TrainResult, ...] = ()
    """Results of the stages before."""

    @property
    def asked(self) -> TrainRecipe:
        """Return the recipe of the user, of which `recipe` may be a stage."""
        return self.whole or self.recipe


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Hold the output folder for the processes of this run: another command that would write it is refused."""
    refusal: BadInput | None = None
    with ExitStack() as stack:
        if run.world.first:
            try:
                stack.enter_context(open_output(run.output, source=run.recipe.start or "", resume=True))
            except BadInput as error:
                refusal = error
        if run.world.total(float(refusal is not None))[0]:
            raise refusal or BadInput(f"{run.output} cannot be opened by the first process")
        yield


def claim(run: Run, resume: bool, overwrite: bool) -> bool:
    """Make the output folder ours, with the recipe in it; or find the run that it holds, if that is to go on.

    True for a new run; what it replaces is set aside until `settle`, or `drop` brings it back.
    """
    output, mark = run.output, run.output / RECIPE
    if resume and overwrite:
        raise BadInput("--resume goes on with the run that --overwrite would delete: give one of them")
    if run.world.first:  # a process that was killed while it began leaves this alone in the folder
        part_of(mark).unlink(missing_ok=True)
    begun = resume and mark.is_file()
    if begun:
        before = recipes.load(str(mark))
        if difference := changed(before, run.recipe):
            raise BadInput(f"{output} was begun with another {difference}: resume with the same recipe, or start anew")
    elif not resume or (output.exists() and any(output.iterdir())):
        if not _unfinished(output):
            check_output(output, overwrite, run.recipe.start or "")
        elif not overwrite:
            raise BadInput(f"{output} holds an unfinished training: --resume goes on with it, --overwrite starts anew")
    run.world.wait()
    if begun or not run.world.first:
        run.world.wait()
        return not begun
    if output.exists() and overwrite:
        set_aside(output)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(mark, recipes.dump(run.recipe))
    run.world.wait()
    return True


def _unfinished(output: Path) -> bool:
    """True if a training was begun in `output` and has not written its model yet."""
    mark = output / RECIPE
    if not mark.is_file() or (output / "config.json").exists():
        return False
    try:
        recipes.load(str(mark))
    except BadInput:
        return False
    return True


def read_result(folder: Path) -> TrainResult:
    """The figures of the training that `folder` holds. Raises BadInput where they are damaged."""
    return TrainResult.of(manifest.read_ours(folder / RESULT), str(folder / RESULT))


def settle(run: Run) -> None:
    """Delete what the new run replaces: everything that it needs could be read."""
    if run.world.first:
        discard_old(run.output)


def drop(run: Run, fresh: bool) -> None:
    """Take the new output folder away where nothing can be trained; what it was to replace is back."""
    if fresh and run.world.first:
        put_back(run.output)


def changed(before: TrainRecipe, now: TrainRecipe) -> str | None:
    """Name the first field in which two recipes differ, with both values; None where a run may go on.

    How the work is done may differ, as long as batches are the same.
    """
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    for recipe in (old, new):
        del recipe["device"]
        recipe["run"] = {name: recipe["run"][name] for name in ("batch_size", "train")}
    return _difference(old, new)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first field, dotted, in which nested dictionaries differ."""
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            return _difference(was, now, f"{prefix}{name}.")
        return f"{prefix}{name} ({was}, now {now})"
    return None
