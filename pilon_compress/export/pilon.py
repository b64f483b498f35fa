"""Exports to a PILON folder again, cut to a smaller size."""

from pathlib import Path

from transformers import PreTrainedModel

from pilon_compress.config.export import ExportOptions
from pilon_compress.export.packed import size_of
from pilon_compress.export.registry import ExportJob, exporter
from pilon_compress.export.save import drop_bundled, save_beside
from pilon_compress.models import checkpoint
from pilon_compress.models.provenance import RECIPE
from pilon_compress.results.export import Exported


def refuse(model: PreTrainedModel, options: ExportOptions) -> str | None:
    """Say why there is nothing to write; None with a size to cut to."""
    return None if options.keep is not None else "is in this form already: name a smaller size with --keep"


@exporter(
    "pilon",
    about="A PILON model of a smaller size, --keep, from one that was converted with --elastic.",
    load="AutoModel.from_pretrained({folder!r})",
    refuse=refuse,
    dtype_when_saved=True,
)
def write(model: PreTrainedModel, job: ExportJob) -> Exported:
    """Write the cut model with its tokenizer, and the recipe, which names the dense model and the texts."""
    dtype = checkpoint.find_dtype(job.options.dtype or "auto") or model.dtype
    drop_bundled(model.config)
    recipe = Path(checkpoint.resolve(job.source)) / RECIPE

    def add(folder: Path) -> None:
        if recipe.is_file():
            note = f"# of the model that `export --keep {job.options.keep:g}` cut\n"
            (folder / RECIPE).write_text(note + recipe.read_text("utf-8"), "utf-8")

    save_beside(model, job, dtype, add)
    return Exported.model_validate(size_of(model, dtype.itemsize))
