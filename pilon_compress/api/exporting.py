"""Export a PILON model to a form that other programs load."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pilon_compress.api.context import ModelLike, calling
from pilon_compress.config.export import ExportOptions
from pilon_compress.convert.refit import refit_on_text
from pilon_compress.export import run as exports
from pilon_compress.models.in_memory import hold
from pilon_compress.results.export import ExportResult


def export(
    model: ModelLike,
    output: str | Path,
    to: str = "dense",
    options: ExportOptions | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write a PILON `model` to the folder `output` in another form.

    model   an object, which does not change, or a reference
    to      dense: stock transformers loads it, at the dense model's size. self-contained: brings its own code.
            packed: ternary weights in bytes. Other exporters may be registered (docs/extending).

    Raises BadInput for a form that there is not, or that cannot take the model.
    """
    with calling(), hold(model, tokenizer) as reference:
        asked = options or ExportOptions()
        return exports.export(reference, output, to, asked, overwrite=overwrite, refit=refit_on_text)
