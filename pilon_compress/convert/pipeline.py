"""The road from a dense checkpoint to a PILON folder.

    prepare -> load -> moments -> plan -> solve layer by layer -> install -> save -> load back -> evaluate -> report

Data goes down this list; each step is a function below that reads in one sitting.
"""

import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pilon_compress
from pilon_compress.config import conversion
from pilon_compress.config.effort import EFFORTS
from pilon_compress.convert.build_model import build
from pilon_compress.convert.calibrate.second_moments import Moments
from pilon_compress.convert.cost import estimate, stages
from pilon_compress.convert.plan import Plan
from pilon_compress.convert.planning import Planned, plan_conversion
from pilon_compress.convert.prepare import PROCESS_BYTES, Job, prepare
from pilon_compress.convert.sharing.shared_banks import fit_shared
from pilon_compress.convert.solve.layer import Method, uniform_rank
from pilon_compress.convert.solve.layerwise import solve
from pilon_compress.convert.solve.solved import Solved
from pilon_compress.data import calibration, sequences, text
from pilon_compress.data.batch import Batch
from pilon_compress.distill.refine import refine
from pilon_compress.errors import BadInput
from pilon_compress.evaluate import bank_usage, evaluate
from pilon_compress.export.save import save_model
from pilon_compress.io import companions, progress
from pilon_compress.io.folders import fresh_folder, open_output
from pilon_compress.io.journal import Journal
from pilon_compress.io.malloc import give_back_freed, trim
from pilon_compress.io.output_paths import check_output
from pilon_compress.models import checkpoint
from pilon_compress.models.families import Site
from pilon_compress.models.source import Source, available, open_source
from pilon_compress.models.stream_check import check_stream
from pilon_compress.models.task import vocabulary
from pilon_compress.nn import size
from pilon_compress.nn.layout import layout_of
from pilon_compress.report import conversion_page
from pilon_compress.report.card import conversion_card

log = logging.getLogger(__name__)

BASELINES = ("whitened-svd", "svd")  # what every report sets the conversion against, at equal stored size
SPECTRUM_POINTS = 128
BLOCK_POOL = 1024  # blocks of text that calibration draws from, or four times as many as it draws
LESSONS = 8  # refinement reads so many times the calibration's text


def convert(
    settings: conversion.Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    command: str = "",
    on_start: Callable[[Job, dict[str, float]], None] | None = None,
    on_plan: Callable[[Job], None] | None = None,
) -> dict[str, Any]:
    """Convert the dense model that `settings` names and write a PILON model folder to `output`.

    The folder appears whole or not at all: weights (safetensors), config, tokenizer, recipe.yaml, README.md (model
    card), report.html, report.json. Returns the report (the contents of report.json). Raises BadInput for anything
    that the user can mend: see `errors.BadInput`. `on_start` is told the job and its cost (`cost.estimate`) before
    weights are read, `on_plan` the job once its plan is final.
    """
    with open_output(output, overwrite, settings.model) as path:
        job = prepare(settings)
        if on_start is not None:
            on_start(job, estimate(job))
        give_back_freed(scarce=settings.max_memory is not None)
        with progress.stages(stages(job)):
            return _convert(settings, path, overwrite, command, job, on_plan)


def dry_run(
    settings: conversion.Recipe, output: str | Path | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Return the plan of `convert` with its sizes and cost, as plain data; writes nothing.

    Raises BadInput as `convert` does: for the output, too, where it is named.
    """
    if output is not None:
        check_output(output, overwrite, settings.model)
    job = prepare(settings)
    expected = estimate(job)
    give_back_freed(scarce=settings.max_memory is not None)
    job = settle(job)
    return {"dry_run": True, "final": job.final, **job.describe(), "estimate": expected}


def _convert(
    settings: conversion.Recipe,
    output: Path,
    overwrite: bool,
    command: str,
    job: Job,
    on_plan: Callable[[Job], None] | None,
) -> dict[str, Any]:
    """Convert into `output`, which this process holds."""
    started = time.perf_counter()
    expected = estimate(job)
    beside = companions.find(checkpoint.resolve(settings.model))
    torch.manual_seed(settings.seed)
    device = checkpoint.find_device(settings.device)
    tokenizer = checkpoint.load_tokenizer(settings.model)
    job = say_beginning(job, tokenizer)
    batches = read_calibration(job, tokenizer)
    lessons = read_lessons(job, tokenizer, batches)
    exam = read_evaluation(job)
    source = open_dense(job, device)
    check_stream(source, batches[0], head=job.causal)
    journal = Journal(output, fingerprint(job, batches, source))
    with journal.open():
        planned = plan_conversion(source, job, batches, journal)
        job = planned.job
        if on_plan is not None:
            on_plan(job)
        model, plan, solved = solve_plan(source, planned, batches, journal)
        del planned
        trim()
        refined = improve(model, source.model, lessons, settings)
        result = describe(job, plan, solved, batches) | {"refinement": refined}
        result |= {
            "command": command,
            "output": str(output),
            "recipe": conversion.dump(job.recipe),
            "estimate": expected,
        }
        with fresh_folder(output, overwrite) as folder:
            save_model(model, tokenizer, folder, job.dtype)
            companions.copy(beside, folder)
            del model, solved
            trim()
            result |= judge(job, folder, source, tokenizer, exam)
            result["seconds"] = time.perf_counter() - started
            result["peak_rss_gib"] = peak_rss_gib()
            (folder / "recipe.yaml").write_text(result["recipe"])
            (folder / "README.md").write_text(conversion_card(result), encoding="utf-8")
            conversion_page.write_report(result, folder)
    journal.remove()
    return result


def settle(job: Job) -> Job:
    """The job with the plan that `convert` would make of it: reads text and weights where that needs them.

    Writes nothing that stays. A model whose weights are not there keeps its plan as it is, not final, and says so.
    """
    if job.final:
        return job
    folder = Path(checkpoint.resolve(job.recipe.model))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        log.info("%s holds no weights: sizes are about, layers are sized by calibration", job.recipe.model)
        return job
    torch.manual_seed(job.recipe.seed)
    tokenizer = checkpoint.load_tokenizer(job.recipe.model)
    job = say_beginning(job, tokenizer)
    batches = read_calibration(job, tokenizer)
    read_evaluation(job)
    source = open_dense(job, checkpoint.find_device(job.recipe.device))
    check_stream(source, batches[0], head=job.causal)
    with TemporaryDirectory(prefix="pilon-compress-") as scratch:  # what does not fit in memory, see `put_away`
        journal = Journal(Path(scratch) / "plan") if source.streamed else Journal()
        return plan_conversion(source, job, batches, journal).job


def compress(
    source: Source,
    job: Job,
    batches: list[Batch],
    journal: Journal | None = None,
    moments: Moments | None = None,
) -> tuple[PreTrainedModel, Plan, Solved]:
    """Plan and solve: the model, its plan and the solution."""
    planned = plan_conversion(source, job, batches, journal, moments)
    return solve_plan(source, planned, batches, journal)


def solve_plan(
    source: Source, planned: Planned, batches: list[Batch], journal: Journal | None = None
) -> tuple[PreTrainedModel, Plan, Solved]:
    """Solve every layer in the sizes of the plan; the model, its plan and the solution."""
    job, settings, journal = planned.job, planned.job.recipe, journal or Journal()
    sweeps = EFFORTS[settings.effort].sweeps
    fits = fit_shared(planned.dense, job.plan, planned.left, planned.fits, settings.seed, sweeps, journal)
    solved = solve(
        planned.dense,
        job.plan,
        planned.left,
        Method(settings.method, BASELINES, job.plan.ratio, job.quantization),
        fits=fits,
        batches=batches if job.sequential else None,
        dtypes=(source.model.dtype, job.dtype) if source.streamed else (source.model.dtype,),
        journal=journal,
    )
    model = build(source, job.plan, solved, job.dtype, job.quantization)
    if layout_of(model) != job.layout:
        raise RuntimeError("the model that was built is not the one that was planned")
    return model, job.plan, solved


def open_dense(job: Job, device: torch.device) -> Source:
    """The dense model, streamed where it is large. Raises BadInput if it is to be refined, which needs all of it."""
    limit, dtype = job.recipe.max_memory, getattr(torch, compute_dtype(job, device))
    parameters = sum(parameter.numel() for parameter in job.dense.parameters())
    source = open_source(job.recipe.model, parameters, dtype, device, limit)
    if source.streamed and job.recipe.refine.steps:
        raise BadInput(
            f"refinement holds the dense and the converted model in memory, {available(limit) / 2**30:.3g} GiB are too "
            "little for that: leave out --refine, or raise --max-memory"
        )
    return source


def improve(
    model: PreTrainedModel, dense: PreTrainedModel, lessons: list[Batch], settings: conversion.Recipe
) -> dict[str, Any] | None:
    """Refine the model in place if the recipe says so; what came of it."""
    asked = settings.refine
    if not asked.steps:
        return None
    return refine(model, dense, lessons, steps=asked.steps, minutes=asked.minutes, seed=settings.seed).to_dict()


def fingerprint(job: Job, batches: list[Batch], source: Source) -> str:
    """Of everything that a conversion's steps depend on: version, recipe, calibration text, weights."""
    settings = job.recipe.model_copy(update={"max_memory": None})  # which changes no result
    state = blake2b(f"{pilon_compress.__version__}\n{conversion.dump(settings)}".encode(), digest_size=16)
    for batch in batches:
        state.update(batch.input_ids.numpy().tobytes())
    for parameter in source.parameters():
        state.update(str(float(parameter.detach().sum(dtype=torch.float64))).encode())
    return state.hexdigest()


def say_beginning(job: Job, tokenizer: PreTrainedTokenizerBase) -> Job:
    """The job with the tokens that begin every sequence in its recipe. Raises BadInput if that has named others."""
    found, named = sequences.begins_with(tokenizer) or sequences.NOTHING, job.recipe.calibration.begins_with
    if not job.causal:  # texts of an encoder are framed by the tokenizer alone
        return job
    if named is not None and named != found:
        raise BadInput(
            f"calibration.begins_with is {named!r} in the recipe, but the tokenizer puts {found} before a "
            "text: leave it out, or give the tokenizer that the recipe was made with"
        )
    calibration = job.recipe.calibration.model_copy(update={"begins_with": found})
    return replace(job, recipe=job.recipe.model_copy(update={"calibration": calibration}))


def read_calibration(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Draw from the calibration part of the text, and tokenise; the held-out part is left for evaluation."""
    asked = job.calibration
    documents = text.open_text(asked.data, part="calibration")
    if job.causal:
        windows = sequences.windows(tokenizer, documents, asked.sequence_length)
        drawn = text.sample(windows, asked.samples, job.recipe.seed, max(BLOCK_POOL, 4 * asked.samples))
        batches = calibration.causal_batches(drawn, asked.batch_size)
        unit = f"blocks of {asked.sequence_length} tokens"
    else:
        texts = text.sample(text.paragraphs(documents), asked.samples, job.recipe.seed)
        batches = calibration.encoder_batches(tokenizer, texts, asked.sequence_length, asked.batch_size)
        unit = "paragraphs"
    found, needed = calibration.sequences(batches), min(asked.batch_size, asked.samples)
    if found < needed:
        raise BadInput(
            f"{asked.data} holds {found} {unit} for calibration, one batch needs {needed}: "
            "give more text, or lower --batch-size or --sequence-length"
        )
    sequences.check_ids(tokenizer, calibration.largest_id(batches), vocabulary(job.config))
    return batches


def read_lessons(job: Job, tokenizer: PreTrainedTokenizerBase, batches: list[Batch]) -> list[Batch]:
    """What refinement learns from: more of the calibration source, where it can be read twice."""
    asked = job.calibration
    if not job.recipe.refine.steps or asked.data == "stdin":
        return batches
    samples = job.recipe.refine.samples or LESSONS * asked.samples
    return read_calibration(replace(job, calibration=replace(asked, samples=samples)), tokenizer)


def read_evaluation(job: Job) -> list[str] | str:
    """The documents to judge by, or why there are none. Read before anything is computed, since they may not be there.

    Text that was asked for must be there; the default, the held-out part of the calibration source, may be too short.
    """
    asked = job.recipe.evaluation
    if asked.data == "none":
        return "not asked for"
    try:
        documents = list(text.open_text(asked.data or job.calibration.data, part="all" if asked.data else "held-out"))
        evaluate.check(documents, job.causal)
    except BadInput as error:
        if asked.data:
            raise
        return f"{error}; --eval-data names other text"
    return documents


def describe(job: Job, plan: Plan, solved: Solved, batches: list[Batch]) -> dict[str, Any]:
    """The report's contents, less what is known only after saving."""
    methods = next(iter(solved.errors.values()))
    losses = {method: [errors[method] for errors in solved.errors.values()] for method in methods}
    return {
        "format_version": 1,
        "pilon_compress": pilon_compress.__version__,
        "source": job.recipe.model,
        "method": job.recipe.method,
        **job.describe(),
        "whitened_loss": {method: sum(values) / len(values) for method, values in losses.items()},
        "projections": [describe_projection(site, plan, solved) for site in job.sites],
        "banks": [
            {
                "band": bank.band,
                "role": bank.role,
                "layers": bank.layers,
                **bank_usage.describe(solved.banks[bank.name].fit.energy, solved.banks[bank.name].fit.selected),
            }
            for bank in plan.banks
        ],
        "kept": size.kept(job.dense, job.layout),
        "calibration": {
            "data": job.calibration.data,
            "texts": calibration.sequences(batches),
            "tokens": calibration.tokens(batches),
            "begins_with": _begins_with(job),
        },
    }


def _begins_with(job: Job) -> str | None:
    """The tokens before every sequence, for the report."""
    named = job.recipe.calibration.begins_with
    return None if named == sequences.NOTHING else named


def describe_projection(site: Site, plan: Plan, solved: Solved) -> dict[str, Any]:
    """One projection's error by method, and the spectrum of its dense weight with the cut that baselines make."""
    values = solved.projections[site.name].spectrum
    points = torch.linspace(0, len(values) - 1, min(SPECTRUM_POINTS, len(values))).round().long()
    share = values / values.sum().clamp_min(1e-300)
    band = next(index for index, layers in enumerate(plan.bands) if site.layer in layers)
    return {
        "name": site.name,
        "layer": site.layer,
        "role": site.role,
        "band": band,
        "relative_error": {method: error**0.5 for method, error in solved.errors[site.name].items()},
        "spectrum": {"index": (points + 1).tolist(), "energy": share[points.to(share.device)].tolist()},
        "cut": uniform_rank(site, plan.ratio),
    }


def judge(
    job: Job,
    folder: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    exam: list[str] | str,
) -> dict[str, Any]:
    """Load the saved folder back and measure it against the dense model: `evaluation`, or None and why not."""
    dense = source.model
    if source.streamed and not isinstance(exam, str):
        held = (2 * sum(p.numel() for p in job.dense.parameters()) * dense.dtype.itemsize + PROCESS_BYTES) / 2**30
        memory = available(job.recipe.max_memory) / 2**30
        if held > memory:
            exam = f"both models in memory take {held:.3g} GiB of {memory:.3g}; `eval` scores the converted one alone"
        else:
            dense = checkpoint.load_model(job.recipe.model, dtype=dense.dtype, device=str(source.device))
    dtype = job.dtype if source.streamed and isinstance(exam, str) else dense.dtype
    saved = checkpoint.load_model(str(folder), dtype=dtype, device=str(source.device))
    if isinstance(exam, str):
        return {"evaluation": None, "evaluation_skipped": exam}
    asked = evaluate.affordable(job.recipe.evaluation, dense)
    figures = evaluate.measure(saved, tokenizer, exam, against=dense, settings=asked, seed=job.recipe.seed)
    data = asked.data or f"{job.calibration.data} (held-out part)"
    return {"evaluation": {**figures, "data": data}}


def compute_dtype(job: Job, device: torch.device) -> str:
    """Half precision is slow on CPUs and lossy for moments: compute in float32 there, as stored on a GPU."""
    return "float32" if device.type == "cpu" else str(job.dtype).removeprefix("torch.")


def peak_rss_gib() -> float:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
