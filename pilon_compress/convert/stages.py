"""The stages of a conversion with their expected cost, for `progress.stages`."""

from pilon_compress.convert.prepare import PARAGRAPH, Job
from pilon_compress.measure.evaluate import EVALUATED

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
        found += [("reference outputs", once), ("sizing layers", FACTORISATION * sizing)]
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
    head = embedding if job.causal else 0
    return sum(parameter.numel() for parameter in job.dense.parameters()) - embedding + head


def _joint_fits(job: Job) -> float:
    """Operations of fitting banks that several layers share."""
    total = 0.0
    for bank in job.plan.banks:
        inner, width = bank.n_primitives * bank.rank, bank.d_in + bank.d_out
        total += 2 * FIT_EVALUATIONS * len(bank.sites) * inner * width * (width + 3 * inner)
    return total
