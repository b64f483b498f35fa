"""Our own rows of a comparison: what each one's recipe changes, and how the pipeline makes its model."""

from pilon_compress.compare.candidate import Candidate
from pilon_compress.config import conversion
from pilon_compress.convert import pipeline
from pilon_compress.convert.calibrate.second_moments import Moments
from pilon_compress.convert.prepare import ConversionJob
from pilon_compress.data.batch import Batch
from pilon_compress.models.source import Source
from pilon_compress.nn.formats.registry import grids
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.size import replaced_size
from pilon_compress.plugins import Registry
from pilon_compress.report.methods import METHODS, REFERENCES, Curve, Method, PlotStyle, reference

OURS: Registry[list[str]] = Registry("method of ours")  # name -> overrides of the recipe, as in `convert --set`
_LOOKS = {  # of number formats; that of another one follows from its name
    "int8": PlotStyle("#7aa6c2", "p", "-."),
    "int4": PlotStyle("#2f6f9f", "H", "-."),
    "int3": PlotStyle("#12355b", ">", "-."),
    "int2": PlotStyle("#4c5f9e", "8", "-."),
}


def _register(name: str, overrides: list[str], title: str, about: str, style: PlotStyle) -> None:
    OURS.add(name, overrides)
    METHODS.add(name, Method(name, title, Curve(name, title, about, style)))


_register(
    "pilon",
    [],
    "PILON",
    "neurons, ranks and plain matrices allocated over all layers in a two-sided metric, each layer fitted behind the "
    "converted ones before it",
    REFERENCES["pilon"],
)
_register(
    "pilon-bands",
    ["budget.share=always"],
    "PILON, shared banks",
    "the same, but every band of layers shares banks of primitives, fitted together and grouped by who uses them",
    PlotStyle("#17618f", "h", "-."),
)
_register(
    "pilon-neurons",
    ["budget.share=always", "budget.primitive=neurons"],
    "PILON, shared neurons",
    "every band of layers shares a bank of whole neurons, matched between the layers and fitted together",
    PlotStyle("#0b3c5d", "P", ":"),
)
_register(
    "pilon-low-rank",
    ["budget.neurons=false"],
    "PILON, all neurons",
    "the same without dropping neurons: ranks alone are allocated",
    PlotStyle("#56B4E9", "o", "--"),
)
_register(
    "pilon-refined",
    ["refine.steps=600"],
    "PILON, refined",
    "the same, then trained on unlabelled text to answer as the dense model does",
    PlotStyle("#003f66", "D"),
)
for _kind, _grid in grids().items():
    _register(
        f"pilon-{_kind}",
        [f"form.bank_dtype={_kind}"],
        f"PILON, {_kind}",
        f"the same with its numbers in {_grid.bits:g} bits, rounded in the metric that it was fitted in",
        _LOOKS.get(_kind) or reference(f"pilon-{_kind}"),
    )


def settings(base: conversion.Recipe, method: str, ratio: float) -> conversion.Recipe:
    """The recipe of one of OURS at one ratio. Raises BadInput for a ratio that is out of range."""
    size = f"budget.ffn_ratio={float(ratio)}"
    return conversion.build(base.model_dump(exclude_none=True, exclude_unset=True), [size, *OURS[method]])


def candidate(job: ConversionJob, source: Source, batches: list[Batch], moments: Moments, seed: int) -> Candidate:
    """The model that `convert` would make of `job` from this calibration text; the only place that calls the pipeline.

    `batches` is the text itself, `moments` what one pass over it has seen. Refinement learns from the same text only.
    """
    asked = job.seeded(seed)
    model, solved = pipeline.plan_and_solve(source, asked, batches, moments=moments)
    pipeline.improve(model, source.model, batches, asked.recipe)
    losses = [errors[job.recipe.method] for errors in solved.errors.values()]
    return Candidate(model, replaced_size(layout_of(model)), losses)
