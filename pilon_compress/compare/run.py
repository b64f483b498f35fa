"""PILON against the published baselines: same dense model, same text, same budgets, same counting.

seed -> calibrate -> method and ratio -> approximate -> install -> evaluate -> one cell
cells -> measure.comparison -> compare.json, compare.html, compare.md
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pilon_compress
from pilon_compress.compare import our_methods
from pilon_compress.compare.baselines.registry import BASELINES
from pilon_compress.compare.candidate import baseline, dense_size, problem_of
from pilon_compress.compare.our_methods import OURS
from pilon_compress.config import conversion
from pilon_compress.config.budget import Budget
from pilon_compress.config.comparison import CompareCommand
from pilon_compress.convert import pipeline
from pilon_compress.convert.calibrate.second_moments import gather
from pilon_compress.convert.prepare import ConversionJob, prepare
from pilon_compress.data import calibration
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.evaluate import evaluate
from pilon_compress.io.folders import fresh_folder, journal_of, open_output
from pilon_compress.io.output_paths import check_output
from pilon_compress.io.progress import track
from pilon_compress.io.result_log import ResultLog
from pilon_compress.models import checkpoint
from pilon_compress.models.source import Source
from pilon_compress.models.stream_check import check_stream
from pilon_compress.nn.size import DENSE_ITEMSIZE, Size, linear_macs, replaced_size
from pilon_compress.report import comparison_page
from pilon_compress.report.methods import method_of
from pilon_compress.results.comparison import (
    Cell,
    Comparison,
    Measured,
    PlannedCalibration,
    PlannedCell,
    PlannedComparison,
)
from pilon_compress.results.evaluation import Evaluation
from pilon_compress.results.sizes import Sizes


def every_method() -> list[str]:
    """Names of all methods: our own, then the baselines."""
    return [*OURS, *BASELINES]


def default_methods() -> list[str]:
    """Names of the methods that are compared where none is named: those in bfloat16, at equal stored numbers."""
    quantised = {name for name, overrides in OURS.items() if any("bank_dtype" in one for one in overrides)}
    return [name for name in every_method() if name not in quantised and takes_ratio(name)]


def takes_ratio(method: str) -> bool:
    """True if `method` is sized by a ratio of stored numbers; False if it keeps all and saves on their bits."""
    return method in OURS or BASELINES[method].units is not None


def method_table() -> tuple[list[str], list[list[str]]]:
    """Headings and rows of what `compare --list` prints: every method, what it is, what it is compared at."""
    rows = []
    for name in every_method():
        equal = "numbers" if name in default_methods() else "bytes"
        rows.append([name, method_of(name).title, f"equal {equal}", method_of(name).curve.about])
    return ["method", "title", "compared at", "what it does"], rows


@dataclass(frozen=True)
class ComparisonJob:
    """A comparison before it starts. `jobs`: what our own methods would do, by method and ratio; `base`: any job.

    `ratios` are those of all methods together: 1 is among them for those that keep all numbers.
    """

    base: ConversionJob
    ratios: list[float]
    methods: list[str]
    seeds: list[int]
    jobs: dict[tuple[str, float], ConversionJob]
    work: list[tuple[str, float]]

    def describe(self) -> PlannedComparison:
        """Return the planned measurements; `planned` has the stored and bytes ratio that each method reaches."""
        dense = dense_size(self.base.sites)
        planned = []
        for method, ratio in sorted(self.work, key=lambda item: -item[1]):
            if method in OURS:
                size = replaced_size(self.jobs[method, ratio].layout)  # in bfloat16, as all are counted
                stored, asked = size.stored, size.bytes
            else:
                stored, asked = BASELINES[method].planned(self.base.sites, ratio)
            sizes = {"stored_ratio": stored / dense.stored, "bytes_ratio": asked / dense.bytes}
            planned.append(PlannedCell(method=method, ratio=ratio, stored=stored, **sizes))
        return PlannedComparison(
            dry_run=True,
            source=self.base.recipe.model,
            seeds=self.seeds,
            cells=len(planned) * len(self.seeds),
            calibration=PlannedCalibration(**vars(self.base.calibration)),
            planned=planned,
        )


def plan(settings: conversion.Recipe, ratios: Sequence[float], methods: Sequence[str], seeds: int) -> ComparisonJob:
    """Size every method at every ratio, for `seeds` calibration seeds from `settings.seed` on.

    Loads no weights and reads no text. Raises BadInput for an unknown method, for a ratio that is too small for one.
    """
    known = every_method()
    for method in methods:
        if method not in known:
            raise BadInput(f"no method {method!r}; there are {', '.join(known)}")
    if seeds < 1 or not methods or not ratios:
        raise BadInput("a comparison needs at least one method, one ratio and one seed")
    ratios, methods = sorted(set(ratios), reverse=True), list(dict.fromkeys(methods))
    base = prepare(
        our_methods.settings(settings, "pilon", 1.0)
    )  # at full size: a small ratio is for each method to refuse
    for ratio in ratios:  # refused where it is no ratio, whatever is compared
        our_methods.settings(settings, "pilon", ratio)
    work = [(method, ratio) for method in methods for ratio in (ratios if takes_ratio(method) else [1.0])]
    jobs = {}
    for method, ratio in work:
        if method in OURS:
            jobs[method, ratio] = prepare(our_methods.settings(settings, method, ratio))
        else:
            BASELINES[method].planned(base.sites, ratio)
    shown = sorted({ratio for _, ratio in work}, reverse=True)
    return ComparisonJob(base, shown, methods, list(range(settings.seed, settings.seed + seeds)), jobs, work)


def planned(config: CompareCommand) -> ComparisonJob:
    """Return the comparison that `config` asks for. Raises BadInput as `plan` does."""
    return plan(config.recipe(config.model), config.ffn_ratio, config.methods or default_methods(), config.seeds)


def dry_run(config: CompareCommand, output: str | Path | None = None, *, overwrite: bool = False) -> PlannedComparison:
    """Return what `run` would measure. Raises BadInput, for the output, too, where it is named."""
    if output is not None:
        check_output(output, overwrite, config.model, kind="comparison")
    return planned(config).describe()


def run(config: CompareCommand, output: str | Path, *, overwrite: bool = False, command: str = "") -> Comparison:
    """Plan and measure the comparison that `config` asks for: see `compare`."""
    check_output(output, overwrite, config.model, kind="comparison")
    return compare(planned(config), output, overwrite=overwrite, command=command, device=config.device)


def compare(
    asked: ComparisonJob, output: str | Path, *, overwrite: bool = False, command: str = "", device: str = "auto"
) -> Comparison:
    """Measure every cell and write compare.json, compare.html and compare.md to the folder `output`.

    Finished cells are kept beside `output` until it is written, and reused when the same comparison starts again.
    Raises BadInput.
    """
    with open_output(output, overwrite, asked.base.recipe.model, kind="comparison") as path:
        return _compare(asked, path, overwrite, command, device)


def _compare(asked: ComparisonJob, output: Path, overwrite: bool, command: str, device: str) -> Comparison:
    """Compare into `output`, which this process holds."""
    started, job = time.perf_counter(), asked.base
    tokenizer = checkpoint.load_tokenizer(job.recipe.model)
    exam = job.read_evaluation()
    if isinstance(exam, str):
        raise BadInput(f"a comparison needs text to judge by: {exam}")
    drawn = {seed: job.seeded(seed).read_calibration(tokenizer) for seed in asked.seeds}
    where = checkpoint.find_device(device)
    dtype = pipeline.compute_dtype(job.dtype, where)
    evaluator = Evaluator(
        job, checkpoint.load_model(job.recipe.model, dtype=dtype, device=str(where), share=True), tokenizer, exam
    )
    cells = ResultLog(output, evaluator.fingerprint())
    dense = _dense(evaluator, cells)
    measured = [cell for seed, batches in drawn.items() for cell in _measure(asked, seed, batches, evaluator, cells)]
    data = {
        "format_version": 1,
        "pilon_compress": pilon_compress.__version__,
        "source": job.recipe.model,
        "command": command,
        "output": str(output),
        "journal": journal_of(output),
        "ratios": asked.ratios,
        "methods": asked.methods,
        "seeds": asked.seeds,
        "calibration": {
            "data": job.calibration.data,
            "texts": max(calibration.sequences(batches) for batches in drawn.values()),
            "tokens": max(calibration.tokens(batches) for batches in drawn.values()),
        },
        **comparison_page.summarise(measured, dense),
        "cells": measured,
        "seconds": time.perf_counter() - started,
    }
    result = Comparison.model_validate(data)
    with fresh_folder(output, overwrite, "comparison") as folder:
        comparison_page.write(result.dump(), folder)
    cells.remove()
    return result


class Evaluator:
    """The dense model and the text that every candidate is judged by, the same for all."""

    def __init__(
        self, job: ConversionJob, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[str]
    ) -> None:
        self.job, self.dense, self.tokenizer, self.documents = job, dense, tokenizer, documents
        self.size = dense_size(job.sites)

    def quality(self, model: PreTrainedModel) -> Evaluation:
        """Figures of `model` against the dense one."""
        asked = evaluate.affordable(self.job.recipe.evaluation, self.dense)
        figures = evaluate.measure(
            model, self.tokenizer, self.documents, against=self.dense, settings=asked, seed=self.job.recipe.seed
        )
        return figures.model_copy(update={"data": asked.data or f"{self.job.calibration.data} (held-out part)"})

    def sizes(self, ffn: Size) -> dict[str, Sizes]:
        """`ffn` and `model`: numbers, bytes in bfloat16 and MACs, with their ratios to the dense ones."""
        rest = sum(p.numel() for p in self.dense.parameters()) - self.size.stored
        macs = linear_macs(self.dense) - self.size.macs
        whole = ffn + Size(rest, rest, rest * DENSE_ITEMSIZE, rest * DENSE_ITEMSIZE, macs, macs)
        return {"ffn": ffn.over_dense(), "model": whole.over_dense()}

    def fingerprint(self) -> str:
        """Return a hash of all that the cells depend on: version, settings without ratio, evaluation text, weights."""
        settings = conversion.dump(self.job.recipe.model_copy(update={"budget": Budget()}))
        state = blake2b(f"{pilon_compress.__version__}\n{settings}".encode(), digest_size=16)
        for document in self.documents:
            state.update(document.encode("utf-8", "surrogatepass") + b"\0")
        for name, parameter in self.dense.named_parameters():
            state.update(name.encode())
            state.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
        return state.hexdigest()


def _dense(evaluator: Evaluator, cells: ResultLog) -> dict[str, Any]:
    """The dense model judged like the others: what a perfect row looks like."""
    if "dense" not in cells.found:
        judged = Measured.model_validate(
            {**evaluator.sizes(evaluator.size), "whitened_loss": 0.0, "quality": evaluator.quality(evaluator.dense)}
        )
        cells.keep("dense", judged.dump())
    found: dict[str, Any] = cells.found["dense"]
    return found


def _measure(
    asked: ComparisonJob, seed: int, batches: list[Batch], evaluator: Evaluator, cells: ResultLog
) -> list[dict[str, Any]]:
    """The cells of one seed: every method at every ratio. Calibrates only if one is missing."""
    ids = blake2b(b"".join(batch.input_ids.numpy().tobytes() for batch in batches), digest_size=8).hexdigest()
    work = {(method, ratio): f"{method} {ratio:g} {seed} {ids}" for method, ratio in asked.work}
    missing = [item for item, key in work.items() if key not in cells.found]
    if missing:
        torch.manual_seed(seed)
        source = Source(evaluator.dense)
        check_stream(source, batches[0], head=asked.base.causal)
        moments = gather(source, batches, asked.base.sites, causal=asked.base.causal, seed=seed)
        problem = problem_of(evaluator.dense, asked.base.sites, {s.input: moments.input(s) for s in asked.base.sites})
        for number, (method, ratio) in enumerate(missing, 1):
            began, label = time.perf_counter(), f"{number}/{len(missing)} {method} {ratio:g}"
            if method in OURS:
                candidate = our_methods.candidate(asked.jobs[method, ratio], source, batches, moments, seed)
            else:
                (candidate,) = [baseline(method, ratio, problem, evaluator.dense) for _ in track([method], label)]
            figures = {
                "whitened_loss": max(0.0, sum(candidate.losses) / len(candidate.losses)),
                "fit_seconds": time.perf_counter() - began,
                "quality": evaluator.quality(candidate.model),
            }
            about = {"method": method, "ratio": ratio, "seed": seed}
            cells.keep(
                work[method, ratio], Cell.model_validate(about | evaluator.sizes(candidate.size) | figures).dump()
            )
    return [cells.found[key] for key in work.values()]
