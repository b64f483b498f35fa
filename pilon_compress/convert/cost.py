"""The cost of a conversion before it starts: stage by stage for the progress line, seconds and memory for the plan."""

import time

import torch

from pilon_compress.convert.prepare import PARAGRAPH, PROCESS_BYTES, Job, shelf_bytes
from pilon_compress.convert.sensitivity import SCORED, SHARE
from pilon_compress.convert.source import is_streamed
from pilon_compress.measure.evaluate import EVALUATED
from pilon_compress.measure.size import ffn_size
from pilon_compress.models.blocks import blocks
from pilon_compress.models.task import text_config

STARTING = 5.0  # seconds for reading the model, the text and what is imported on the way
STATES = 3  # hidden states of the calibration text that are in memory at once: two streams, and masks and such
SIZINGS = 9  # eigendecompositions per weight in an allocation
EVALUATION_TOKENS = {True: EVALUATED, False: 500 * 60}  # causal LM: windows; encoder: paragraphs
COSTS = {"forward": 1.5, "backward": 4.0, "pass": 2.0}  # of a token and a parameter, in multiply-adds × 2
FACTORISATION = 2.0  # time of an operation in a factorisation, over that in a matrix product
FIT_EVALUATIONS = 100  # of a joint fit's loss and gradient


def stages(job: Job) -> list[tuple[str, float]]:
    """Return (beginning of the phase's description, floating-point operations) of every phase, in order."""
    calibration = job.calibration
    tokens = calibration.samples * calibration.sequence_length * (1.0 if job.causal else PARAGRAPH)
    parameters = _computed_parameters(job)
    once = COSTS["pass"] * tokens * parameters
    squares = sum(site.d_in**2 + site.d_out**2 for site in job.sites)
    found = [
        ("calibrating, forward", 2 * COSTS["forward"] * tokens * parameters),
        ("calibrating, output", once / 20),
        ("calibrating, backward", COSTS["backward"] * tokens * parameters + 2.0 * tokens * squares),
    ]
    if job.allocated:
        sizing = sum(
            10 * SIZINGS * min(s.d_in, s.d_out) ** 3 + (16 * s.d_in**3 if s.role == "down" else 0) for s in job.sites
        )
        layers = len({site.layer for site in job.sites})
        share = SHARE / (layers / 2 + 2)
        looked_at = min(share * tokens, SCORED) if job.causal else share * tokens
        measured = COSTS["pass"] * looked_at * layers * (parameters + _head(job)) / 2
        found += [("reference outputs", once * share), ("sizing layers", FACTORISATION * sizing + measured)]
    joint = _joint_fits(job)
    if job.shares and job.allocated:
        found += [("comparing layers", joint / 10), ("trying shared banks", joint)]
    found.append(("fitting shared banks", joint if any(len(bank.sites) > 1 for bank in job.plan.banks) else 0.0))
    fits = sum(12 * s.d_in * s.d_out * (s.d_in + s.d_out) + 40 * min(s.d_in, s.d_out) ** 3 for s in job.sites)
    found.append(("converting layers", FACTORISATION * fits + (2 * once if job.anchored else 0)))
    if steps := job.recipe.refine.steps:
        step = 8 * parameters * calibration.batch_size * calibration.sequence_length
        found += [("refining", step * steps / 2)] * 2
    if job.recipe.evaluation.data != "none":
        scored = COSTS["pass"] * EVALUATION_TOKENS[job.causal] * parameters
        found += [("evaluating", 2 * scored)] if job.causal else [("embedding", scored)] * 2
    return found


def _computed_parameters(job: Job) -> int:
    """Parameters that take part in a product for every token: all but the input embedding, with the head."""
    embedding = job.dense.get_input_embeddings().weight.numel()
    tied = getattr(text_config(job.config), "tie_word_embeddings", False)
    return sum(p.numel() for p in job.dense.parameters()) - (0 if job.causal and tied else embedding)


def _head(job: Job) -> int:
    """Parameters of the product that gives the logits; an encoder has none."""
    return job.dense.get_input_embeddings().weight.numel() if job.causal else 0


def _joint_fits(job: Job) -> float:
    """Operations of fitting banks that several layers share."""
    total = 0.0
    for bank in job.plan.banks:
        inner, width = bank.n_primitives * bank.rank, bank.d_in + bank.d_out
        total += 2 * FIT_EVALUATIONS * len(bank.sites) * inner * width * (width + 3 * inner)
    return total


def estimate(job: Job) -> dict[str, float]:
    """Return `seconds` and `peak_gib` that the conversion will take here, from operations and this machine's speed.

    A guide, not a promise: the speed is measured on one matrix product, and the fit may stop early.
    """
    seconds = STARTING + sum(operations for _, operations in stages(job)) / _gemm_flops()
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
    held = _held(job, parameters, 4 * moments) + states
    return {"seconds": seconds, "peak_gib": (PROCESS_BYTES + held + max(work, _block_bytes(job))) / 2**30}


def _held(job: Job, parameters: int, moments: int) -> int:
    """Bytes of weights, moments and results that are in memory together, read whole or block by block."""
    limit = job.recipe.max_memory
    ffn = ffn_size(job.layout, job.dtype.itemsize)
    if not is_streamed(job.recipe.model, parameters, limit):
        return 4 * parameters + min(moments, shelf_bytes(limit)) + 2 * 4 * ffn.stored
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(job.dense).values()]
    outside, rest = parameters - sum(sizes), sum(sizes) - ffn.dense_stored
    calibrating, building = 8 * max(sizes), job.dtype.itemsize * rest + ffn.bytes
    return 4 * outside + ffn.bytes + max(calibrating, building)


def _block_bytes(job: Job) -> int:
    """Bytes that sizing one layer takes in float64: weights, metrics, and neurons' moments twice more, reordered."""
    layers: dict[int, int] = {}
    for site in job.sites:
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
