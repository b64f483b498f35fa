"""Exports to a smaller checkpoint of the base architecture: the same code and config, with fewer neurons."""

from pathlib import Path

from transformers import PreTrainedModel

from pilon_compress.config.export import ExportOptions
from pilon_compress.export import dense
from pilon_compress.export.registry import DEFAULTS, ExportJob, exporter
from pilon_compress.export.save import save_beside
from pilon_compress.export.verify import difference, outputs
from pilon_compress.models import checkpoint
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.layout import Layout
from pilon_compress.results.export import Exported


def refuse(model: PreTrainedModel, options: ExportOptions = DEFAULTS) -> str | None:
    """Say why the config of the base architecture cannot describe `model`; None if it can."""
    layout = layout_of(model)
    if reason := dense.refuse(model, options) or factors(layout):
        return reason
    if dense.narrow_config(model, layout) is None:
        return "has layers of different widths, which no stock config describes: convert with --uniform-width"
    return None


def factors(layout: Layout) -> str | None:
    """Say, as the end of a sentence, that a layout has factors, which stock formats do not; None if it has none."""
    if not layout.projections:
        return None
    return (
        "has low-rank factors, which no stock format has: convert with --uniform-width or --whole-matrices, or take "
        "--to dense, which multiplies them out"
    )


@exporter(
    "native",
    about="The base architecture with fewer neurons, the same in every layer: stock code loads it, smaller and faster.",
    load="AutoModel.from_pretrained({folder!r})",
    refuse=refuse,
)
def write(model: PreTrainedModel, job: ExportJob) -> Exported:
    """Write the narrow model; what was written is loaded again by transformers, and compared, before it is kept."""
    before = outputs(model)
    dense.to_dense(model)
    measured = dict[str, float]()

    def verify(folder: Path) -> None:
        found = checkpoint.load_model(str(folder))
        measured["max_logit_difference"] = difference(found, before, "native")

    save_beside(model, job, model.dtype, verify)
    return Exported.model_validate(measured)
