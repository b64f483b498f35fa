"""The road from a dense checkpoint to a PILON folder.

    prepare -> load -> calibrate -> fit every bank -> install -> save -> load back -> evaluate -> report, card

Data goes down this list; each step is a function below that reads in one sitting.
"""

import copy
import resource
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pilon_compress
from pilon_compress import checkpoint, recipe, text
from pilon_compress.convert import calibration
from pilon_compress.convert.factorize import Target, components
from pilon_compress.convert.fit import BankFit, fit_bank
from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.prepare import Job, prepare
from pilon_compress.deploy.card import model_card
from pilon_compress.deploy.save import check_output, copy_companions, fresh_folder, save_model
from pilon_compress.errors import BadInput
from pilon_compress.families import Site
from pilon_compress.form.fold import prune_unused
from pilon_compress.form.layout import banks, install, layout_of, projections
from pilon_compress.measure import composition, evaluate, report, size
from pilon_compress.progress import track

PEERS = ("whitened-svd", "svd")  # what every report sets the conversion against, at equal stored size
SPECTRUM_POINTS = 128
CAUSAL_WINDOWS = 64  # scored by the evaluation that ends a conversion; `eval` scores all of the text


@dataclass
class Fitted:
    """One bank's solution with what the report says of it."""

    plan: BankPlan
    fit: BankFit
    biases: dict[str, Tensor]
    projections: list[dict[str, Any]]
    relative_losses: dict[str, list[float]]


def convert(
    settings: recipe.Recipe, output: str | Path, *, overwrite: bool = False, command: str = "", job: Job | None = None
) -> dict[str, Any]:
    """Convert the dense model that `settings` names and write a PILON model folder to `output`.

    The folder appears whole or not at all: weights (safetensors), config, tokenizer, recipe.yaml, README.md (model
    card), report.html, report.json. Returns the report (the contents of report.json). Raises BadInput for anything
    that the user can mend: see `errors.BadInput`. `job` is `prepare(settings)`, where the caller has it already.
    """
    started = time.perf_counter()
    output = Path(output)
    check_output(output, overwrite, settings.model)
    job = job or prepare(settings)
    torch.manual_seed(settings.seed)
    device = checkpoint.find_device(settings.device)
    tokenizer = checkpoint.load_tokenizer(settings.model)
    batches = read_calibration(job, tokenizer)
    exam = read_evaluation(job)
    dense = checkpoint.load_model(settings.model, dtype=compute_dtype(job, device), device=str(device))
    checkpoint.check_finite(dense)
    moments = calibration.calibrate(dense, batches, job.sites)
    fitted = [fit(bank, dense, moments, settings) for bank in track(job.plan.banks, "fitting banks")]
    model = build(dense, job, fitted)
    result = describe(job, model, fitted, batches)
    result |= {"command": command, "output": str(output), "recipe": recipe.dump(job.recipe)}
    with fresh_folder(output, overwrite) as folder:
        save_model(model, tokenizer, folder, job.dtype)
        copy_companions(checkpoint.resolve(settings.model), folder)
        del model
        result |= judge(job, folder, dense, tokenizer, exam)
        result["seconds"] = time.perf_counter() - started
        result["peak_rss_gib"] = peak_rss_gib()
        (folder / "recipe.yaml").write_text(result["recipe"])
        (folder / "README.md").write_text(model_card(result))
        report.write_report(result, folder)
    return result


def read_calibration(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[calibration.Batch]:
    """Tokenise the calibration part of the text; the held-out part is left for evaluation."""
    asked = job.calibration
    documents = text.open_text(asked.data, part="calibration")
    if job.causal:
        batches = calibration.causal_batches(
            tokenizer, documents, asked.sequence_length, asked.samples, asked.batch_size
        )
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
    return batches


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


def fit(
    bank: BankPlan, dense: PreTrainedModel, moments: dict[str, calibration.SecondMoment], settings: recipe.Recipe
) -> Fitted:
    """Solve one bank in the metric of its layers, and set it against the peers at equal stored size."""
    targets = [target_of(site, dense, moments[site.input]) for site in bank.sites]
    if settings.method == "pilon":
        solved = fit_bank(targets, bank, settings.seed)
    else:
        solved = private_fit(targets[0], bank, settings.method)
    rank, losses = bank.private_rank(), {}
    for method in dict.fromkeys((settings.method, *PEERS)):
        losses[method] = [
            target.relative_loss(
                solved.approximation(i) if method == settings.method else target.truncated(method, rank)
            )
            for i, target in enumerate(targets)
        ]
    biases, entries = {}, []
    for index, (site, target) in enumerate(zip(bank.sites, targets, strict=True)):
        if site.bias:
            biases[site.name] = absorb_bias(site, dense, target, solved.approximation(index), moments[site.input])
        values = target.whitened[1]
        points = torch.linspace(0, len(values) - 1, min(SPECTRUM_POINTS, len(values))).round().long()
        share = values / values.sum().clamp_min(1e-300)
        entries.append(
            {
                "name": site.name,
                "layer": site.layer,
                "role": site.role,
                "band": bank.band,
                "relative_error": {method: max(0.0, loss[index]) ** 0.5 for method, loss in losses.items()},
                "spectrum": {"index": (points + 1).tolist(), "energy": share[points.to(share.device)].tolist()},
                "cut": rank,
            }
        )
    return Fitted(bank, solved, biases, entries, losses)


def target_of(site: Site, dense: PreTrainedModel, moment: calibration.SecondMoment) -> Target:
    """The site's weight as (d_in, d_out) with its metric: centred where a bias absorbs the mean error."""
    weight = dense_weight(dense, site)
    metric = moment.covariance() if site.bias else moment.second_moment()
    return Target.of(site.name, site.layer, weight, metric)


def dense_weight(dense: PreTrainedModel, site: Site) -> Tensor:
    """(d_in, d_out) float64, whichever way round the host stores it."""
    module = dense.base_model.get_submodule(site.name)
    weight = module.weight.detach().double()
    return weight if type(module).__name__ == "Conv1D" else weight.T


def private_fit(target: Target, bank: BankPlan, method: str) -> BankFit:
    """A peer's closed form in PILON's clothes: one primitive per layer, composed with weight 1."""
    A, B = components(target.weight, target.vectors(method), bank.rank)
    loss = [target.loss(A @ B)]
    one = torch.ones(1, 1, device=A.device, dtype=A.dtype)
    selected = torch.zeros(1, 1, dtype=torch.long, device=A.device)
    return BankFit(A[None], B[None], selected, one.expand(1, 1, bank.rank).clone(), one, loss, loss)


def absorb_bias(
    site: Site, dense: PreTrainedModel, target: Target, approximation: Tensor, moment: calibration.SecondMoment
) -> Tensor:
    """b' = b + (W - Ŵ)ᵀ μ: the mean output error on the calibration text becomes zero, at no cost."""
    bias = dense.base_model.get_submodule(site.name).bias
    return bias.detach().double() + moment.mean.double() @ (target.weight - approximation)


@torch.no_grad()
def build(dense: PreTrainedModel, job: Job, fitted: list[Fitted]) -> PreTrainedModel:
    """The PILON model: a copy of `dense` that shares every other tensor with it. Unused primitives are dropped."""
    shared = {id(tensor): tensor for tensor in chain(dense.parameters(), dense.buffers())}
    model = copy.deepcopy(dense, memo=dict(shared))
    install(model, job.layout)
    by_name = dict(banks(model))
    composed = dict(projections(model))
    for solution in fitted:
        bank = by_name[solution.plan.name]
        bank.A.copy_(solution.fit.A)
        bank.B.copy_(solution.fit.B)
        for index, site in enumerate(solution.plan.sites):
            layer = composed[site.name]
            layer.weight.copy_(solution.fit.weight[index])
            layer.selected.copy_(solution.fit.selected[index])
            if layer.bias is not None:
                layer.bias.copy_(solution.biases[site.name])
    model.to(dense.device)
    prune_unused(model)
    return model.eval()


def describe(
    job: Job, model: PreTrainedModel, fitted: list[Fitted], batches: list[calibration.Batch]
) -> dict[str, Any]:
    """The report's contents, less what is known only after saving."""
    layout = layout_of(model)  # the plan's, less the primitives that no layer selected
    methods = fitted[0].relative_losses
    every = {method: [loss for one in fitted for loss in one.relative_losses[method]] for method in methods}
    return {
        "format_version": 1,
        "pilon_compress": pilon_compress.__version__,
        "source": job.recipe.model,
        "method": job.recipe.method,
        "plan": job.describe_plan(),
        "ffn": size.ffn_size(layout, job.dtype.itemsize).to_dict(),
        "model": size.model_size(layout, job.dense, job.dtype.itemsize).to_dict(),
        "dtype": str(job.dtype).removeprefix("torch."),
        "whitened_loss": {method: max(0.0, sum(values) / len(values)) for method, values in every.items()},
        "projections": [entry for one in fitted for entry in one.projections],
        "banks": [
            {
                "band": one.plan.band,
                "role": one.plan.role,
                "layers": one.plan.layers,
                **composition.describe(one.fit.energy, one.fit.selected),
            }
            for one in fitted
        ],
        "kept": size.kept(job.dense, job.layout),
        "calibration": {
            "data": job.calibration.data,
            "texts": calibration.sequences(batches),
            "tokens": calibration.tokens(batches),
        },
    }


def judge(
    job: Job,
    folder: Path,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    exam: list[str] | str,
) -> dict[str, Any]:
    """Load the saved folder back and measure it against `dense`: `evaluation`, or None and why it was skipped."""
    saved = checkpoint.load_model(str(folder), dtype=dense.dtype, device=str(dense.device))
    if isinstance(exam, str):
        return {"evaluation": None, "evaluation_skipped": exam}
    asked = job.recipe.evaluation
    if job.causal and asked.samples is None:
        asked = asked.model_copy(update={"samples": CAUSAL_WINDOWS})
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
