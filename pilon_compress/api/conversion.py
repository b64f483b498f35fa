"""Compress a model, save and load the result."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.api.context import ModelLike, Texts, calling, device_of
from pilon_compress.config.conversion import ConvertConfig
from pilon_compress.convert.pipeline import convert, convert_in_memory, write_pages
from pilon_compress.data.memory import hold as hold_texts
from pilon_compress.errors import BadInput
from pilon_compress.export.save import MODELING_FILE, save_model
from pilon_compress.io import companions
from pilon_compress.io.folders import fresh_folder
from pilon_compress.io.output_paths import expanded
from pilon_compress.models import checkpoint
from pilon_compress.models.companions import companions_of
from pilon_compress.models.in_memory import Record, hold, keep_record, record_of
from pilon_compress.models.provenance import RECIPE
from pilon_compress.models.references import resolve
from pilon_compress.optimize.monitor import METRICS
from pilon_compress.report.training_page import PAGE, PICTURE
from pilon_compress.results.conversion import Report
from pilon_compress.train.run import RESULT

PAGES = ("recipe.yaml", "README.md", "report.json", "report.html", RESULT, PAGE, PICTURE, METRICS)


def compress(
    model: ModelLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: ConvertConfig | None = None,
    calibration: Texts | None = None,
    *,
    evaluation: Texts | None = None,
    progress: bool = False,
) -> tuple[PreTrainedModel, Report]:
    """Compress the feed-forward weights of a dense `model`, or all that `config.targets` names; return the compressed
    model and its report.

    model         an object of transformers, which does not change, or a reference: hub id, folder, .gguf, package:NAME
    tokenizer     of the object; of a reference its own by default
    config        size, form and effort; by default half of the feed-forward parameters
    calibration   texts, or the name of a source; by default WikiText-2 for causal language models, and Python's
                  documentation for encoders. One document in five is held out, for the evaluation.
    evaluation    texts, or a source, to evaluate on instead; "none" skips it
    progress      show a line with the position and the time that is left on stderr

    The result is a model of the same class, in eval mode and in the dense model's dtype: `generate`, `save_pretrained`
    and the Trainer take it like any other. `save` writes it with its report. Raises BadInput, a ValueError.
    """
    asked = config or ConvertConfig()
    with (
        calling(progress),
        hold(model, tokenizer) as reference,
        hold_texts(calibration) as text,
        hold_texts(evaluation) as exam,
    ):
        recipe = asked.recipe(reference, text, exam)
        recipe = recipe.model_copy(update={"device": device_of(model, recipe.device)})
        found = convert_in_memory(recipe)
    keep_record(found.model, Record(found.tokenizer, found.companions, report=found.report))
    return found.model, found.report


def convert_model(
    model: str | Path,
    folder: str | Path,
    config: ConvertConfig | None = None,
    calibration: Texts | None = None,
    *,
    evaluation: Texts | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Compress a dense `model`, named by reference, into a `folder`; return the report.

    For large models: one that does not fit in memory is read block by block, and a conversion that was interrupted goes
    on when it is called again. The other arguments are those of `compress`. Raises BadInput.
    """
    with calling(progress), hold_texts(calibration) as text, hold_texts(evaluation) as exam:
        recipe = (config or ConvertConfig()).recipe(str(model), text, exam)
        return convert(recipe, folder, overwrite=overwrite)


def save(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write `model` to a `folder` that `load`, the command line and `from_pretrained` take; return its path.

    Beside weights, config and tokenizer it holds what is known of the model: recipe, model card, report, and the
    companion files of the dense one. The folder appears whole or not at all. `tokenizer` is needed for models that
    come from neither `compress` nor `load`, `heal` or `train`. Raises BadInput.
    """
    record = record_of(model)
    tokenizer = tokenizer or record.tokenizer
    if tokenizer is None:
        raise BadInput(f"this {type(model).__name__} carries no tokenizer: give one, as `tokenizer`")
    with calling(), fresh_folder(folder, overwrite) as work:
        save_model(model, tokenizer, work, model.dtype)
        for name, content in record.pages.items():
            (work / name).write_bytes(content)
        if record.report is not None:
            write_pages(record.report.model_copy(update={"output": str(folder)}), work)
        companions.copy({name: file for name, file in record.companions.items() if file.is_file()}, work)
    return expanded(folder)


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    keep: float | None = None,
    n_hot: float | None = None,
) -> PreTrainedModel:
    """Load a PILON or dense model by reference, with the class that its config names, in eval mode.

    keep    share of the feed-forward numbers to load, above 0 and at most 1, from a file that was converted with
            `elastic`: see docs/convert.md
    n_hot   share of each bank's primitives to hold in memory, above 0 and below 1; the others stay in the files: see
            docs/tiers.md

    Its tokenizer and its pages stay with the object, for the other calls. Raises BadInput.
    """
    with calling():
        loaded = checkpoint.load_model(str(model), dtype=dtype, device=device, keep=keep, n_hot=n_hot)
        record = read_record(str(model))
        if keep not in (None, 1):  # card and report are of the larger model
            record = replace(record, pages={name: page for name, page in record.pages.items() if name == RECIPE})
        keep_record(loaded, record)
    return loaded


def read_record(reference: str) -> Record:
    """Record the files that stand beside the weights of a model."""
    tokenizer = None
    with suppress(BadInput):  # models without a tokenizer load, too
        tokenizer = checkpoint.load_tokenizer(reference)
    folder = Path(resolve(reference))
    pages = {name: (folder / name).read_bytes() for name in PAGES if (folder / name).is_file()}
    beside = companions_of(reference, quiet=True) if folder.is_dir() else {}
    beside.pop(MODELING_FILE, None)
    return Record(tokenizer, beside, pages)
