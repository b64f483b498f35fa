"""Our own rows of a comparison: what each one's recipe changes, and how the pipeline makes its model."""

from pilon_compress.compare.candidate import Candidate
from pilon_compress.config import conversion
from pilon_compress.convert import pipeline
from pilon_compress.convert.calibrate.second_moments import Moments
from pilon_compress.convert.prepare import Job
from pilon_compress.data.batch import Batch
from pilon_compress.models.source import Source
from pilon_compress.nn.integer import KINDS
from pilon_compress.nn.layout import layout_of
from pilon_compress.nn.size import ffn_size

# method -> overrides of the recipe, as in `convert --set`
OURS: dict[str, list[str]] = {
    "pilon": [],
    "pilon-shared": ["budget.sharing=auto"],
    "pilon-low-rank": ["budget.neurons=false"],
    "pilon-refined": ["refine.steps=600"],
    **{f"pilon-{kind}": [f"form.bank_dtype={kind}"] for kind in KINDS},
}


def settings(base: conversion.Recipe, method: str, ratio: float) -> conversion.Recipe:
    """The recipe of one of OURS at one ratio. Raises BadInput for a ratio that is out of range."""
    size = [f"budget.ffn_ratio={float(ratio)}", "budget.preset=null"]
    return conversion.build(base.model_dump(exclude_none=True), [*size, *OURS[method]])


def candidate(job: Job, source: Source, batches: list[Batch], moments: Moments, seed: int) -> Candidate:
    """The model that `convert` would make of `job` from this calibration text; the only place that calls the pipeline.

    `batches` is the text itself, `moments` what one pass over it has seen. Refinement learns from the same text only.
    """
    asked = job.seeded(seed)
    model, _, solved = pipeline.compress(source, asked, batches, moments=moments)
    pipeline.improve(model, source.model, batches, asked.recipe)
    losses = [errors[job.recipe.method] for errors in solved.errors.values()]
    return Candidate(model, ffn_size(layout_of(model)), losses)
