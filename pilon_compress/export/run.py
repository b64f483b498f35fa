"""Exports a PILON folder to one of the registered forms, and says which of them can take a model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from pilon_compress.config.export import ExportOptions
from pilon_compress.errors import BadInput
from pilon_compress.export.registry import DEFAULTS, EXPORTERS, ExportJob
from pilon_compress.io import manifest
from pilon_compress.io.folders import open_output
from pilon_compress.models import checkpoint
from pilon_compress.models.in_memory import held_model
from pilon_compress.nn.layout import BANKS
from pilon_compress.results.export import ExportResult


def export(
    source: str,
    output: str | Path,
    to: str,
    options: ExportOptions = DEFAULTS,
    *,
    overwrite: bool = False,
    refit: Callable[[PreTrainedModel, str, str], None] | None = None,
) -> ExportResult:
    """Write the PILON model `source` to the folder `output` in the form `to`, one of EXPORTERS.

    `refit` is called with the cut model, `source` and the text where `options` name a `calibration`.
    Raises BadInput for a form that there is not, for options that it
    does not read, and for a model that it cannot take.
    """
    exporter = EXPORTERS[to]
    exporter.check(options)
    if options.calibration is not None and options.keep is None:
        raise BadInput("--calibration refits a cut: name its size with --keep")
    with open_output(output, overwrite, source) as path:
        dtype = "auto" if exporter.dtype_when_saved else options.dtype or "auto"
        model = load_pilon(source, dtype, options.keep)
        if reason := exporter.reason(source, model, options):
            raise BadInput(f"{source} {reason}")
        if options.calibration is not None:
            if refit is None:
                raise TypeError("a calibration needs a function that refits")
            refit(model, source, options.calibration)
        figures = exporter.write(model, ExportJob(source, path, options, overwrite))
    load = exporter.load.format(folder=str(output))
    return ExportResult(source=source, output=str(output), to=to, load=load, figures=figures)


@dataclass(frozen=True)
class Target:
    """A form of `export MODEL --list`: its name, what it is, and why it cannot take the model; "" if it can."""

    target: str
    about: str
    reason: str


def targets(source: str, options: ExportOptions = DEFAULTS) -> list[Target]:
    """Return every form, and why it cannot take `source`. Raises BadInput for a folder that does not load."""
    model = load_pilon(source, "auto", options.keep)
    return [
        Target(name, exporter.about, exporter.reason(source, model, options) or "")
        for name, exporter in EXPORTERS.items()
    ]


def load_pilon(source: str, dtype: str, keep: float | None = None) -> PreTrainedModel:
    """Load `source`, which must be a PILON model, cut to `keep`. Raises BadInput if it is dense."""
    model = checkpoint.load_model(source, dtype=dtype, keep=keep)
    if held_model(source) is None:
        manifest.verify_folder(checkpoint.resolve(source))
    if not hasattr(model.base_model, BANKS):
        raise BadInput(f"{source} is a dense model already; export takes the output of `pilon-compress convert`")
    return model
