"""The cost of a conversion before it starts: stage by stage for the progress line, seconds and memory for the plan."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pilon_compress.convert.allocate.uniform import make_plan
from pilon_compress.convert.calibrate.sensitivity import PASSES, SCORED
from pilon_compress.convert.experts.clusters import ROUNDS, TOKENS
from pilon_compress.convert.neurons.bank_fit import SWEEPS
from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.prepare import PARAGRAPH, PROCESS_BYTES, ConversionJob, store_bytes
from pilon_compress.convert.texts import EXAM
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.evaluate import EVALUATED
from pilon_compress.models.blocks import blocks
from pilon_compress.models.families import Site
from pilon_compress.models.source import is_streamed
from pilon_compress.models.task import text_config, vocabulary
from pilon_compress.nn.size import model_size, replaced_size
from pilon_compress.results.conversion import Estimate

STARTING = 12.0  # seconds for reading model and text, checking the stream and writing the folder
STATES = 3  # hidden states of the calibration text that are in memory at once: two streams, and masks and such
SIZINGS = 9  # eigendecompositions per weight in an allocation
TRIAL = 0.5  # of a joint fit: gains are measured with half the sweeps
FIT_EVALUATIONS = 100  # of a joint fit's loss and gradient
WINDOW = 1024  # tokens of an evaluation's input
ENCODED = 500 * 60  # tokens of an encoder's evaluation

# Operations in units of a large product's, measured on SmolLM2-135M and MiniLM on two cores: what is not a product
# (attention, norms, softmax over the vocabulary) takes as long again, and factorisations run far below its speed.
PASS = 5.0  # of a token and a parameter, forward
LOOK = 8.0  # the same while layers are measured one by one: few tokens at a time
BACK = 15.0  # forward and backward
GRAM = 2.5  # of a token and an entry of a Gram matrix
EIGENVALUES, ELIMINATION = 27.0, 42.0  # of the cubed size of a matrix
FIT = (40.0, 60.0)  # of d_in · d_out · (d_in + d_out), and of the smaller side cubed
ROUNDING = 250.0  # of d_in² · d_out, where matrices become integers
CLUSTERS, ASSIGNMENT = 16.0, 1.0  # of a token's activations, and of the cubed neurons: a round of balanced k-means
ANCHOR = 4  # passes of a layer that is fitted behind converted ones

# The constants are of a machine where a large product runs at REFERENCE operations per second. Elsewhere only a share
# of the time goes with the speed of products; the rest (norms, softmax, eigenvalues on one thread) differs little.
# It is fitted on a second machine, whose products run at 1.5e11 (docs/results/real-models.md).
REFERENCE, PRODUCTS = 3.5e11, 0.4


def stages(job: ConversionJob) -> list[tuple[str, float]]:
    """Return (beginning of the phase's description, floating-point operations) of every phase, in order."""
    calibration = job.calibration
    tokens = calibration.samples * calibration.sequence_length * (1.0 if job.causal else PARAGRAPH)
    body, head = _products(job.dense, job.causal)
    squares = sum(site.d_in**2 + site.d_out**2 for site in job.sites)
    if job.plan.routers:
        return _carving(job, PASS * tokens * body) + _evaluating(job, body, head)
    found = [
        ("calibrating, forward", PASS * tokens * body),
        ("calibrating, output", BACK * tokens * head),
        ("calibrating, backward", BACK * tokens * body + GRAM * tokens * squares),
    ]
    if job.allocated:
        layers = len({site.layer for site in job.sites})
        looks = len({(site.layer, site.target) for site in job.sites})
        share = PASSES / (layers / 2 + 2)
        looked_at = min(share * tokens, SCORED) if job.causal else share * tokens
        sizing = LOOK * looked_at * looks * (body / 2 + head)
        sizing += sum(SIZINGS * EIGENVALUES * min(site.d_in, site.d_out) ** 3 for site in job.sites)
        sizing += sum(ELIMINATION * site.d_in**3 for site in job.sites if site.role == "down")
        found += [("reference outputs", PASS * looked_at * (body + head)), ("sizing layers", sizing)]
    shares = job.share != "none" and job.allocated
    neurons = shares and job.recipe.budget.primitive == "neurons"
    joint = _joint_fits(_shared_guess(job) if shares and not neurons else job.plan.banks)
    fits = sum(FIT[0] * s.d_in * s.d_out * (s.d_in + s.d_out) + FIT[1] * min(s.d_in, s.d_out) ** 3 for s in job.sites)
    if job.quantization is not None:
        fits += ROUNDING * sum(s.d_in**2 * s.d_out for s in job.sites)
    if job.sequential:
        fits += ANCHOR * PASS * tokens * body + GRAM * tokens * squares
    if neurons:
        found.append(("matching neurons", _matching(job)))
        fits += _neuron_banks(job, tokens * body)
    elif shares:
        found.append(("fitting trial banks", TRIAL * joint))
    if shares and job.share == "auto":
        found.append(("reference outputs", PASS * tokens / EXAM * (body + head)))
    if not neurons:
        found.append(("fitting shared banks", joint))
    if shares and job.share == "auto":  # with and without, and once more without any
        found.append(("trying shared banks", 3 * fits))
    found.append(("converting layers", fits))
    if job.recipe.form.elastic:  # SHARE of the eigenvectors of every neurons' moment
        downs = [site for site in job.sites if site.role == "down"]
        found.append(("neurons' worth", EIGENVALUES * sum(site.d_in**3 for site in downs)))
    if steps := job.recipe.refine.steps:
        step = (BACK + PASS) * (body + head) * calibration.batch_size * tokens / calibration.samples
        found.append(("refining", step * steps))
    return found + _evaluating(job, body, head)


def _evaluating(job: ConversionJob, body: int, head: int) -> list[tuple[str, float]]:
    """Return the phases of the evaluation."""
    if job.recipe.evaluation.data == "none":
        return []
    scored = PASS * (EVALUATED if job.causal else ENCODED) * (body + head)
    return [("evaluating", 2 * scored)] if job.causal else [("embedding", scored)] * 2


def _carving(job: ConversionJob, forward: float) -> list[tuple[str, float]]:
    """Return the phase that carves experts: the text's forward pass, clusters, and the error of every block."""
    downs = [site for site in job.sites if site.role == "down"]
    clusters = sum(ROUNDS * (TOKENS * site.d_in * CLUSTERS + ASSIGNMENT * site.d_in**3) for site in downs)
    return [("carving experts", forward + clusters)]


def _matching(job: ConversionJob) -> float:
    """Operations of matching neurons: inverses of their moments, assignments."""
    ratio = job.recipe.budget.stored_limit
    return sum(ELIMINATION * (ratio * site.d_in) ** 3 for site in job.sites if site.role == "down")


def _neuron_banks(job: ConversionJob, products: float) -> float:
    """Operations of fitting banks of neurons, whose normal equations have the neurons of two layers."""
    widths = [job.recipe.budget.stored_limit * site.d_in for site in job.sites if site.role == "down"]
    return ANCHOR * PASS * products + SWEEPS * sum((2 * width) ** 3 / 3 for width in widths)


def _products(dense: PreTrainedModel, causal: bool) -> tuple[int, int]:
    """Parameters that every token is multiplied with: those of the body, and those of the head (0 for an encoder)."""
    embedding = dense.get_input_embeddings().weight.numel()
    head = embedding if causal else 0
    tied = getattr(text_config(dense.config), "tie_word_embeddings", False)
    return sum(p.numel() for p in dense.parameters()) - embedding - (0 if tied else head), head


def _shared_guess(job: ConversionJob) -> list[BankPlan]:
    """Return banks about as large as those that bands will share: every band's share of the budget, in banks alone."""
    try:
        return make_plan(job.sites, job.recipe.budget, "pilon", job.recipe.form.composition).banks
    except BadInput:  # of shapes or sizes that bands do not fit: few of them will share
        return []


def _joint_fits(banks: Sequence[BankPlan]) -> float:
    """Operations of fitting banks that several layers share."""
    total = 0.0
    for bank in banks:
        inner, width = bank.n_primitives * bank.rank, bank.d_in + bank.d_out
        total += 2 * FIT_EVALUATIONS * len(bank.sites) * inner * width * (width + 3 * inner)
    return total


def estimate(job: ConversionJob) -> Estimate:
    """Return the time and memory that the conversion will take here, from operations and this machine's speed.

    A guide, not a promise: the speed is measured on one matrix product, and the fit may stop early.
    """
    operations = sum(operations for _, operations in stages(job))
    seconds = STARTING + operations * (PRODUCTS / _gemm_flops() + (1 - PRODUCTS) / REFERENCE)
    parameters = sum(p.numel() for p in job.dense.parameters())
    calibration = job.calibration
    tokens = calibration.samples * calibration.sequence_length * (1.0 if job.causal else PARAGRAPH)
    inputs = {site.input: site.d_in for site in job.sites}
    moments = sum(d * d for d in inputs.values()) + sum(site.d_out**2 for site in job.sites)
    work = 0
    for bank in job.plan.banks:
        inner = bank.n_primitives * bank.rank
        sides = bank.d_in**2 + bank.d_out**2 + 2 * bank.d_in * bank.d_out
        steps = 4 * inner * (bank.d_in + bank.d_out) * (4 * len(bank.sites) + 20) if len(bank.sites) > 1 else 0
        work = max(work, 12 * len(bank.sites) * sides + 40 * inner * inner + steps)
    states = 4 * tokens * (getattr(text_config(job.config), "hidden_size", None) or 0) * STATES
    converting = _held(job, parameters, 4 * moments) + states + max(work, _block_bytes(job.sites))
    peak = PROCESS_BYTES + max(converting, _evaluation_bytes(job))
    return Estimate(seconds=seconds, peak_gib=peak / 2**30)


def _evaluation_bytes(job: ConversionJob) -> int:
    """Bytes of both models in float32 and of what they predict for one window, where the result is judged."""
    if job.recipe.evaluation.data == "none":
        return 0
    whole = model_size(job.layout, job.dense, job.dtype.itemsize)
    logits = 4 * WINDOW * vocabulary(job.config) if job.causal else 0
    return 4 * (whole.stored + whole.dense_stored) + 3 * logits


def _held(job: ConversionJob, parameters: int, moments: int) -> int:
    """Bytes of weights, moments and results that are in memory together, read whole or block by block."""
    limit = job.recipe.max_memory
    replaced = replaced_size(job.layout, job.dtype.itemsize)
    if not is_streamed(job.recipe.model, parameters, limit):
        return 4 * parameters + min(moments, store_bytes(limit)) + 2 * 4 * replaced.stored
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(job.dense).values()]
    outside, rest = parameters - sum(sizes), sum(sizes) - replaced.dense_stored
    calibrating, building = 8 * max(sizes), job.dtype.itemsize * rest + replaced.bytes
    return 4 * outside + replaced.bytes + max(calibrating, building)


def _block_bytes(sites: Sequence[Site]) -> int:
    """Bytes that sizing one layer takes in float64: weights, metrics, and neurons' moments twice more, reordered."""
    layers: dict[int, int] = {}
    for site in sites:
        metrics = site.d_out**2 + (3 * site.d_in**2 if site.role == "down" else site.d_in**2)
        layers[site.layer] = layers.get(site.layer, 0) + 8 * (site.d_in * site.d_out + metrics)
    return max(layers.values())


def _gemm_flops() -> float:
    """Float32 multiply-adds per second × 2 of one 1024³ product, best of three."""
    x = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
