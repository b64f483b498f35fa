"""The report of a conversion: what was planned, solved and measured, as `results.conversion.Report`."""

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pilon_compress
from pilon_compress.config import conversion
from pilon_compress.convert.plan import BankPlan, NeuronBankPlan, Plan
from pilon_compress.convert.prepare import PROCESS_BYTES, ConversionJob
from pilon_compress.convert.solve.layer import uniform_rank
from pilon_compress.convert.solve.solved import Solved
from pilon_compress.data import calibration, sequences
from pilon_compress.data.batch import Batch
from pilon_compress.evaluate import bank_usage, evaluate
from pilon_compress.models import checkpoint
from pilon_compress.models.families import Site
from pilon_compress.models.source import Source, available
from pilon_compress.nn import size
from pilon_compress.results.conversion import (
    BankUsage,
    CalibrationText,
    Estimate,
    Projection,
    Refinement,
    Report,
    Spectrum,
)
from pilon_compress.results.evaluation import Evaluation

SPECTRUM_POINTS = 128


def describe(
    job: ConversionJob,
    solved: Solved,
    batches: list[Batch],
    refined: Refinement | None,
    expected: Estimate,
    command: str,
) -> Report:
    """The report of a solved conversion; evaluation, output and time are for the caller to fill in.

    Slices of neurons (`form.moe`) are not solved for: the report then has no errors of projections, nor banks.
    """
    methods = next(iter(solved.errors.values()), {})
    losses = {method: [errors[method] for errors in solved.errors.values()] for method in methods}
    return Report(
        format_version=1,
        pilon_compress=pilon_compress.__version__,
        source=job.recipe.model,
        method=job.recipe.method,
        **described(job),
        whitened_loss={method: sum(values) / len(values) for method, values in losses.items()},
        projections=[describe_projection(site, job.plan, solved) for site in job.sites if solved.projections],
        banks=[_bank(bank, solved) for bank in job.plan.banks]
        + [_neurons(store, solved) for store in job.plan.neuron_banks if solved.stores],
        kept=size.unchanged(job.dense, job.layout),
        calibration=CalibrationText(
            data=job.calibration.data,
            texts=calibration.sequences(batches),
            tokens=calibration.tokens(batches),
            begins_with=_begins_with(job.recipe.calibration.begins_with),
        ),
        refinement=refined,
        command=command,
        output="",
        recipe=conversion.dump(job.recipe),
        estimate=expected,
        evaluation=None,
        seconds=0.0,
        peak_rss_gib=0.0,
    )


def described(job: ConversionJob) -> dict[str, Any]:
    """Return the fields of a plan that are set, for a result that has more."""
    plan = job.describe()
    return {name: getattr(plan, name) for name in type(plan).model_fields if name in plan.model_fields_set}


def _bank(bank: BankPlan, solved: Solved) -> BankUsage:
    fit = solved.banks[bank.name].fit
    used = torch.zeros_like(fit.energy, dtype=torch.bool).scatter_(1, fit.selected.to(fit.energy.device), True)
    return BankUsage(band=bank.band, role=bank.role, layers=bank.layers, **bank_usage.describe(fit.energy, used))


def _neurons(store: NeuronBankPlan, solved: Solved) -> BankUsage:
    starts = [solved.stores[store.name].starts[layer] for layer in store.layers]
    energy = torch.zeros(len(starts), store.neurons, dtype=torch.float64)
    used = torch.zeros_like(energy, dtype=torch.bool)
    for row, start in enumerate(starts):
        energy[row, start.slots.cpu()], used[row, start.slots.cpu()] = start.power.double().cpu(), True
    usage = bank_usage.describe(energy, used)
    return BankUsage(band=store.band, role="neurons", layers=store.layers, **usage)


def _begins_with(named: str | None) -> str | None:
    """Return the tokens before every sequence, for the report; `named` as the recipe has them."""
    return None if named == sequences.NOTHING else named


def describe_projection(site: Site, plan: Plan, solved: Solved) -> Projection:
    """Return a projection's error by method, and the spectrum of its dense weight with the baselines' cut."""
    values = solved.projections[site.name].spectrum
    points = torch.linspace(0, len(values) - 1, min(SPECTRUM_POINTS, len(values))).round().long()
    share = values / values.sum().clamp_min(1e-300)
    band = plan.band_of(site.layer)
    return Projection(
        name=site.name,
        layer=site.layer,
        role=site.role,
        band=band,
        relative_error={method: error**0.5 for method, error in solved.errors[site.name].items()},
        spectrum=Spectrum(index=(points + 1).tolist(), energy=share[points.to(share.device)].tolist()),
        cut=uniform_rank(site, plan.ratio),
    )


def evaluate_converted(
    job: ConversionJob,
    load: Callable[[torch.dtype], PreTrainedModel],
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str] | str,
) -> Evaluation | str:
    """Measure the saved model against the dense one; the reason where that is not done. `load`: in that dtype."""
    dense = source.model
    if source.streamed and not isinstance(documents, str):
        held = (2 * sum(p.numel() for p in job.dense.parameters()) * dense.dtype.itemsize + PROCESS_BYTES) / 2**30
        memory = available(job.recipe.max_memory) / 2**30
        if held > memory:
            documents = (
                f"both models in memory take {held:.3g} GiB of {memory:.3g}; `eval` scores the converted one alone"
            )
        else:
            dense = checkpoint.load_model(job.recipe.model, dtype=dense.dtype, device=str(source.device), share=True)
    dtype = job.dtype if source.streamed and isinstance(documents, str) else dense.dtype
    saved = load(dtype)
    return documents if isinstance(documents, str) else compared(job, saved, dense, tokenizer, documents)


def compared(
    job: ConversionJob,
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
) -> Evaluation:
    """The figures of the converted model against the dense one, by the recipe's evaluation."""
    asked = evaluate.affordable(job.recipe.evaluation, dense)
    figures = evaluate.measure(model, tokenizer, documents, against=dense, settings=asked, seed=job.recipe.seed)
    return figures.model_copy(update={"data": asked.data or f"{job.calibration.data} (held-out part)"})


def finished(report: Report, evaluation: Evaluation | str, seconds: float) -> Report:
    """The report with its evaluation, or the reason why there is none, and with what the conversion took."""
    figures = {"evaluation_skipped": evaluation} if isinstance(evaluation, str) else {"evaluation": evaluation}
    return report.model_copy(update={**figures, "seconds": seconds, "peak_rss_gib": peak_rss_gib()})


def peak_rss_gib() -> float:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
