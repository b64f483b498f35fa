"""Heal a converted model, train one from scratch or on chats, add exit gates."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.api.context import ModelLike, Texts, calling, device_of
from pilon_compress.api.conversion import load
from pilon_compress.config.training import TrainRecipe
from pilon_compress.config.training_calls import ExitGatesConfig, HealConfig, TrainConfig
from pilon_compress.data.memory import hold as hold_texts
from pilon_compress.errors import BadInput
from pilon_compress.models.in_memory import hold, hold_or_none
from pilon_compress.results.training import TrainResult
from pilon_compress.train.pipeline import train_model


def heal(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: HealConfig | None = None,
    data: Texts | None = None,
    *,
    teacher: ModelLike | None = None,
    validation: Texts | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[PreTrainedModel, TrainResult]:
    """Let a converted model learn from its dense `teacher`; return the healed model and its figures.

    model, teacher   objects of transformers, which do not change, or references. `teacher` is by default the dense
                     model that `model` was made from, where that can be loaded.
    data             texts, or the name of a source; one document in five is held out, unless `validation` is given
    output           folder for the model, checkpoints and metrics.jsonl; `resume` goes on with a run that was stopped.
                     Without one nothing is written that stays.

    The result has the weights that were best on the validation text. Raises BadInput.
    """
    asked = config or HealConfig()
    with (
        calling(progress),
        hold(model, tokenizer) as start,
        hold_or_none(teacher) as followed,
        hold_texts(data) as text,
        hold_texts(validation) as held_out,
    ):
        recipe = asked.recipe(start, followed, source=text, validation=held_out)
        recipe = recipe.model_copy(update={"device": device_of(model, recipe.device)})
        return _trained(recipe, output, resume, overwrite, progress)


def train(
    model: ModelLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: TrainConfig | None = None,
    data: Texts | None = None,
    *,
    validation: Texts | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[PreTrainedModel, TrainResult]:
    """Train a language model from scratch, or fine-tune `model` on chats; return the model and its figures.

    model       None: from scratch, of the shape and form in `config`. An object, which does not change, or a reference:
                it learns what assistants say in `data`, a file or hub dataset of chats.
    tokenizer   of the model; from scratch by default the one that `config.host` names
    data, validation, output, resume   as for `heal`

    Raises BadInput.
    """
    asked = config or TrainConfig()
    with (
        calling(progress),
        _start(model, tokenizer) as (start, words),
        hold_texts(data) as text,
        hold_texts(validation) as held_out,
    ):
        recipe = asked.recipe(start, words, source=text, validation=held_out)
        if model is not None:
            recipe = recipe.model_copy(update={"device": device_of(model, recipe.device)})
        return _trained(recipe, output, resume, overwrite, progress)


def add_exit_gates(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: ExitGatesConfig | None = None,
    data: Texts | None = None,
    *,
    validation: Texts | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[PreTrainedModel, TrainResult]:
    """Let tokens of a causal language model skip feed-forward blocks; return the model with gates and its figures.

    model       an object of transformers, which does not change, or a reference; dense or PILON. Its weights stay.
    data        texts, or the name of a source, that prices are estimated on; one document in five is held out for the
                threshold, unless `validation` is given
    output      folder for the model; without one nothing is written that stays

    `result.exits` has the share of the work that is skipped and what it costs. Raises BadInput.
    """
    asked = config or ExitGatesConfig()
    with (
        calling(progress),
        hold(model, tokenizer) as start,
        hold_texts(data) as text,
        hold_texts(validation) as held_out,
    ):
        recipe = asked.recipe(start, source=text, validation=held_out)
        recipe = recipe.model_copy(update={"device": device_of(model, recipe.device)})
        return _trained(recipe, output, False, overwrite, progress)


@contextmanager
def _start(
    model: ModelLike | None, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[str | None, str | None]]:
    """The references of the model to begin with, and of the tokenizer of a new one."""
    if model is None and tokenizer is None:
        yield None, None
        return
    with hold(model, tokenizer) as reference:
        yield (reference, None) if model is not None else (None, reference)


def _trained(
    recipe: TrainRecipe, output: str | Path | None, resume: bool, overwrite: bool, progress: bool
) -> tuple[PreTrainedModel, TrainResult]:
    """Train in `output`, or in a folder that does not stay; the model that it then holds."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("heal and train run on one process: for several, torchrun -m pilon_compress.cli train")
    if output is None and resume:
        raise BadInput("resume goes on with an output folder: name it")
    with TemporaryDirectory(prefix="pilon-compress-") as scratch:
        folder = Path(scratch) / "model" if output is None else output
        result = train_model(recipe, folder, resume=resume, overwrite=overwrite, quiet=not progress)
        assert result is not None  # this process is alone
        made = load(folder)
    return made, result if output is not None else result.model_copy(update={"output": ""})
