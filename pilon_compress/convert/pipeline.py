"""The road from a dense checkpoint to a PILON folder.

    prepare -> load -> moments -> plan -> solve layer by layer -> install -> save -> load back -> evaluate -> report

Data goes down this list; each step is a function below that reads in one sitting.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pilon_compress
from pilon_compress.config import conversion
from pilon_compress.config.effort import EFFORTS
from pilon_compress.convert.build_model import build
from pilon_compress.convert.calibrate.second_moments import Moments
from pilon_compress.convert.cost import estimate, stages
from pilon_compress.convert.experts.carve import carve_experts
from pilon_compress.convert.neurons.bank_fit import NeuronFitter
from pilon_compress.convert.planning import Planned, plan_conversion
from pilon_compress.convert.prepare import ConversionJob, prepare
from pilon_compress.convert.reporting import describe, described, evaluate_converted, finished
from pilon_compress.convert.sharing.shared_banks import fit_shared
from pilon_compress.convert.solve.layer import Method
from pilon_compress.convert.solve.layerwise import solve
from pilon_compress.convert.solve.solved import Solved
from pilon_compress.convert.texts import refinement_text, say_beginning
from pilon_compress.convert.worth import worth_of
from pilon_compress.data.batch import Batch
from pilon_compress.distill.refine import refine
from pilon_compress.elastic import worth
from pilon_compress.elastic.worth import BlockWorth
from pilon_compress.errors import BadInput
from pilon_compress.export.save import declare, save_model
from pilon_compress.io import companions, progress
from pilon_compress.io.folders import fresh_folder, open_output
from pilon_compress.io.journal import Journal
from pilon_compress.io.malloc import give_back_freed, trim
from pilon_compress.io.output_paths import check_output
from pilon_compress.models import checkpoint
from pilon_compress.models.companions import companions_of
from pilon_compress.models.in_memory import copy_of, held_model
from pilon_compress.models.source import Source, available, open_source
from pilon_compress.models.stream_check import check_stream
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.usage import shared_primitives
from pilon_compress.report import conversion_page
from pilon_compress.report.card import conversion_card
from pilon_compress.results.conversion import DryRun, Estimate, Refinement, Report

log = logging.getLogger(__name__)

BASELINES = ("whitened-svd", "svd")  # what every report sets the conversion against, at equal stored size


class Opened(NamedTuple):
    """A conversion whose model and texts are open. `documents`: those of the evaluation, or why there are none.

    held_out: text that judges trials of shared banks, of the calibration source but not among `batches`
    """

    job: ConversionJob
    tokenizer: PreTrainedTokenizerBase
    batches: list[Batch]
    refinement: list[Batch]
    documents: list[str] | str
    source: Source
    expected: Estimate
    held_out: list[Batch] | None = None


class Converted(NamedTuple):
    """A converted model, and what belongs beside it. `companions`: other files of the dense one, by relative name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    companions: dict[str, Path]
    report: Report


def convert(
    settings: conversion.Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    command: str = "",
    on_start: Callable[[ConversionJob, Estimate], None] | None = None,
    on_plan: Callable[[ConversionJob], None] | None = None,
) -> Report:
    """Convert the dense model that `settings` names and write a PILON model folder to `output`.

    The folder appears whole or not at all: weights (safetensors), config, tokenizer, recipe.yaml, README.md (model
    card), report.html, report.json. Returns the report. Raises BadInput for anything
    that the user can mend: see `errors.BadInput`. `on_start` is told the job and its cost (`cost.estimate`) before
    weights are read, `on_plan` the job once its plan is final.
    """
    with open_output(output, overwrite, settings.model) as path:
        job = prepare(settings)
        if on_start is not None:
            on_start(job, estimate(job))
        give_back_freed(scarce=settings.max_memory is not None)
        with progress.stages(stages(job)):
            return _convert(path, overwrite, command, job, on_plan)


def dry_run(settings: conversion.Recipe, output: str | Path | None = None, *, overwrite: bool = False) -> DryRun:
    """Return the plan of `convert` with its sizes and cost; writes nothing.

    Raises BadInput as `convert` does: for the output, too, where it is named.
    """
    if output is not None:
        check_output(output, overwrite, settings.model)
    job = prepare(settings)
    expected = estimate(job)
    give_back_freed(scarce=settings.max_memory is not None)
    job = settle(job)
    return DryRun(dry_run=True, final=job.final, estimate=expected, **described(job))


def _convert(
    output: Path, overwrite: bool, command: str, job: ConversionJob, on_plan: Callable[[ConversionJob], None] | None
) -> Report:
    """Convert into `output`, which this process holds."""
    started = time.perf_counter()
    beside = companions_of(job.recipe.model)
    opened = open_job(job)
    source, tokenizer = opened.source, opened.tokenizer
    journal = Journal(output, fingerprint(opened.job.recipe, opened.batches, source))
    with journal.open():
        model, job, report, blocks = solve_opened(opened, journal, command, on_plan)
        with fresh_folder(output, overwrite) as folder:
            if blocks:
                model.config.keep = 1.0  # which `from_pretrained(folder, keep=0.7)` sets: see the plug-in
                worth.write(blocks, folder)
            save_model(model, tokenizer, folder, job.dtype)
            companions.copy(beside, folder)
            del model
            trim()

            def load(dtype: torch.dtype) -> PreTrainedModel:
                return checkpoint.load_model(str(folder), dtype=dtype, device=str(source.device))

            report = finished(
                report,
                evaluate_converted(job, load, source, tokenizer, opened.documents),
                time.perf_counter() - started,
            )
            report = report.model_copy(update={"output": str(output)})
            write_pages(report, folder)
    journal.remove()
    return report


def convert_in_memory(settings: conversion.Recipe) -> Converted:
    """Convert the dense model that `settings` names as `convert` does, without a folder; nothing is written that stays.

    Weights are rounded to the dtype of the recipe, as a folder would hold them. Raises BadInput as `convert` does.
    """
    if settings.form.elastic:
        raise BadInput(
            "form.elastic writes a file beside the weights: convert to a folder (`pc.convert_model`, "
            "`pilon-compress convert`)"
        )
    started, job = time.perf_counter(), prepare(settings)
    give_back_freed(scarce=settings.max_memory is not None)
    with progress.stages(stages(job)):
        beside = companions_of(settings.model)
        opened = open_job(job)
        source, tokenizer = opened.source, opened.tokenizer
        with TemporaryDirectory(prefix="pilon-compress-") as scratch:  # for what does not fit in memory
            journal = Journal(Path(scratch) / "plan") if source.streamed else Journal()
            model, job, report, _ = solve_opened(opened, journal)
        model = as_saved(model, job.dtype, share=held_model(settings.model) is None)
        trim()

        def load(dtype: torch.dtype) -> PreTrainedModel:
            return copy_of(model, dtype, source.device, share=True)

        evaluation = evaluate_converted(job, load, source, tokenizer, opened.documents)
    return Converted(model, tokenizer, beside, finished(report, evaluation, time.perf_counter() - started))


def as_saved(model: PreTrainedModel, dtype: torch.dtype, share: bool) -> PreTrainedModel:
    """Return a copy of a model that was converted as it comes back from a folder; `share`: see `copy_of`."""
    made = copy_of(model, dtype, model.device, share)
    declare(made, dtype)
    made.config._name_or_path = made.name_or_path = ""  # what it says is where the dense model comes from
    return made


def open_job(job: ConversionJob) -> Opened:
    """Open model and texts, and check that the one can be converted on the others. Raises BadInput."""
    expected = estimate(job)
    torch.manual_seed(job.recipe.seed)
    device = checkpoint.find_device(job.recipe.device)
    tokenizer = checkpoint.load_tokenizer(job.recipe.model)
    job = begun(job, tokenizer)
    batches = job.read_calibration(tokenizer)
    refinement = read_refinement(job, tokenizer, batches)
    documents = job.read_evaluation()
    source = open_dense(job, device)
    check_stream(source, batches[0], head=job.causal)
    judges = job.read_held_out(tokenizer, batches) if job.share == "auto" and job.allocated else None
    return Opened(job, tokenizer, batches, refinement, documents, source, expected, judges)


def solve_opened(
    opened: Opened, journal: Journal, command: str = "", on_plan: Callable[[ConversionJob], None] | None = None
) -> tuple[PreTrainedModel, ConversionJob, Report, list[BlockWorth]]:
    """Plan, solve and refine: the model, the job with its plan, the report without an evaluation, and what cuts need.

    The last is empty unless the conversion is elastic.
    """
    source, batches = opened.source, opened.batches
    if opened.job.plan.routers:
        return carve_opened(opened, command, on_plan)
    planned = plan_conversion(source, opened.job, batches, journal, held_out=opened.held_out)
    job, tried = planned.job, planned.trials
    if on_plan is not None:
        on_plan(job)
    model, solved = solve_plan(source, planned, batches, journal)
    blocks = worth_of(planned)
    del planned
    trim()
    refined = improve(model, source.model, opened.refinement, job.recipe)
    report = describe(job, solved, batches, refined, opened.expected, command)
    ffn = report.ffn.model_copy(update={"shared_primitives": shared_primitives(model)})
    return model, job, report.model_copy(update={"ffn": ffn, "sharing": tried}), blocks


def carve_opened(
    opened: Opened, command: str, on_plan: Callable[[ConversionJob], None] | None
) -> tuple[PreTrainedModel, ConversionJob, Report, list[BlockWorth]]:
    """Carve the blocks into experts, see `experts.carve`: the parts of `solve_opened`'s result."""
    job = opened.job
    if on_plan is not None:
        on_plan(job)
    model, slices = carve_experts(opened.source, job, opened.batches)
    report = describe(job, Solved({}, {}), opened.batches, None, opened.expected, command)
    return model, job, report.model_copy(update={"slices": slices}), []


def write_pages(report: Report, folder: Path) -> None:
    """Write recipe, model card and report beside the weights in `folder`."""
    (folder / "recipe.yaml").write_text(report.recipe)
    (folder / "README.md").write_text(conversion_card(report.dump()), encoding="utf-8")
    conversion_page.write_report(report.dump(), folder)


def settle(job: ConversionJob) -> ConversionJob:
    """The job with the plan that `convert` would make of it: reads text and weights where that needs them.

    Writes nothing that stays. A model whose weights are not there keeps its plan as it is, not final, and says so.
    """
    if job.final:
        return job
    folder = Path(checkpoint.resolve(job.recipe.model))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        log.info("%s holds no weights: sizes are about, layers are sized by calibration", job.recipe.model)
        return job
    opened = open_job(job)
    with TemporaryDirectory(prefix="pilon-compress-") as scratch:  # what does not fit in memory, see `put_away`
        journal = Journal(Path(scratch) / "plan") if opened.source.streamed else Journal()
        return plan_conversion(opened.source, opened.job, opened.batches, journal, held_out=opened.held_out).job


def begun(job: ConversionJob, tokenizer: PreTrainedTokenizerBase) -> ConversionJob:
    """The job with the tokens that begin every sequence in its recipe: see `texts.say_beginning`."""
    if not job.causal:  # texts of an encoder are framed by the tokenizer alone
        return job
    return replace(job, recipe=say_beginning(job.recipe, tokenizer))


def read_refinement(job: ConversionJob, tokenizer: PreTrainedTokenizerBase, batches: list[Batch]) -> list[Batch]:
    """Return the refinement batches: more of the calibration source, if it can be read twice."""
    if not job.recipe.refine.steps or job.calibration.data == "stdin":
        return batches
    return job.read_calibration(tokenizer, refinement_text(job.calibration, job.recipe.refine.samples))


def plan_and_solve(
    source: Source,
    job: ConversionJob,
    batches: list[Batch],
    journal: Journal | None = None,
    moments: Moments | None = None,
) -> tuple[PreTrainedModel, Solved]:
    """Plan and solve: the model and the solution."""
    planned = plan_conversion(source, job, batches, journal, moments)
    return solve_plan(source, planned, batches, journal)


def solve_plan(
    source: Source, planned: Planned, batches: list[Batch], journal: Journal | None = None
) -> tuple[PreTrainedModel, Solved]:
    """Solve every layer in the sizes of the plan; the model and the solution."""
    job, settings, journal = planned.job, planned.job.recipe, journal or Journal()
    sweeps = EFFORTS[settings.effort].sweeps
    fits = fit_shared(planned.dense, job.plan, planned.left, planned.fits, settings.seed, sweeps, journal)
    neurons = NeuronFitter(planned.dense, job.plan, planned.left, planned.slots, planned.scales, batches, journal)
    solved = solve(
        planned.dense,
        job.plan,
        planned.left,
        Method(settings.method, BASELINES, job.plan.ratio, job.quantization),
        fits=fits,
        neurons=neurons,
        batches=batches if job.sequential else None,
        dtypes=(source.model.dtype, job.dtype) if source.streamed else (source.model.dtype,),
        journal=journal,
    )
    model = build(source, job.plan, solved, job.dtype, job.quantization)
    if layout_of(model) != job.layout:
        raise RuntimeError("the model that was built is not the one that was planned")
    return model, solved


def open_dense(job: ConversionJob, device: torch.device) -> Source:
    """The dense model, streamed where it is large. Raises BadInput if it is to be refined, which needs all of it."""
    limit, dtype = job.recipe.max_memory, compute_dtype(job.dtype, device)
    parameters = sum(parameter.numel() for parameter in job.dense.parameters())
    source = open_source(job.recipe.model, parameters, dtype, device, limit)
    if source.streamed and job.recipe.refine.steps:
        raise BadInput(
            f"refinement holds the dense and the converted model in memory, {available(limit) / 2**30:.3g} GiB are too "
            "little for that: leave out --refine, or raise --max-memory"
        )
    return source


def improve(
    model: PreTrainedModel, dense: PreTrainedModel, refinement: list[Batch], settings: conversion.Recipe
) -> Refinement | None:
    """Refine the model in place if the recipe says so; what came of it."""
    asked = settings.refine
    if not asked.steps:
        return None
    return refine(model, dense, refinement, steps=asked.steps, minutes=asked.minutes, seed=settings.seed)


def fingerprint(recipe: conversion.Recipe, batches: list[Batch], source: Source) -> str:
    """Return a hash of all that a conversion's steps depend on: version, recipe, calibration text, weights."""
    settings = recipe.model_copy(update={"max_memory": None})  # which changes no result
    state = blake2b(f"{pilon_compress.__version__}\n{conversion.dump(settings)}".encode(), digest_size=16)
    for batch in batches:
        state.update(batch.input_ids.numpy().tobytes())
    for parameter in source.parameters():
        state.update(str(float(parameter.detach().sum(dtype=torch.float64))).encode())
    return state.hexdigest()


def compute_dtype(saved: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: float32 on CPUs, where half precision is slow, else as weights are saved."""
    return torch.float32 if device.type == "cpu" else saved
