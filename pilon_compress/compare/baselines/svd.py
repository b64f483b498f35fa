"""Two factors for every weight: plain, activation-scaled and whitened SVD.

All three keep the first right singular vectors V of a scaled weight S W and store W V and Vᵀ, which is the scaled
optimum without the inverse of S: S⁻¹ (S W V Vᵀ) = W V Vᵀ.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pilon_compress.compare.baselines.equal_budget import Share, Unit, bias_numbers
from pilon_compress.compare.baselines.problem import Problem, Solution, pair_macs
from pilon_compress.compare.baselines.registry import baseline
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.models.families import Site
from pilon_compress.report.methods import REFERENCES, PlotStyle

ALPHA = 0.5  # of ASVD's scaling; the value that its authors settled on


def units(sites: Sequence[Site]) -> list[Unit]:
    """Return a unit for each site; a step is one rank."""
    return [Unit((site,), site.d_in + site.d_out, bias_numbers([site]), min(site.d_in, site.d_out)) for site in sites]


@baseline(
    "svd",
    title="plain SVD",
    about="each weight's nearest matrix of lower rank; knows no activations",
    paper="Eckart and Young, 1936",
    style=REFERENCES["svd"],
    units=units,
)
def svd(problem: Problem, shares: list[Share]) -> Solution:
    """The nearest matrix of lower rank (Eckart and Young, 1936); knows no activations."""
    return _truncated(problem, shares, lambda target: target.plain[0])


@baseline(
    "asvd",
    title="ASVD",
    about="SVD after scaling the input channels by the square root of their magnitude",
    paper="Yuan et al., 2023",
    style=PlotStyle("#9a6fb0", "<"),
    units=units,
)
def asvd(problem: Problem, shares: list[Share]) -> Solution:
    """ASVD (Yuan et al., 2023): input channels scaled by their magnitude to the power of 0.5 before the SVD.

    Magnitude is the root mean square, less the mean where a bias makes up for that; the paper takes the mean absolute
    value, which calibration does not keep.
    Ranks are uniform: the paper's search over ranks by perplexity is left out.
    """
    return _truncated(problem, shares, _scaled)


@baseline(
    "whitened-svd",
    title="whitened SVD (SVD-LLM)",
    about="SVD in the metric of the inputs' second moment",
    paper="Wang et al., 2024",
    style=REFERENCES["whitened-svd"],
    units=units,
)
def whitened_svd(problem: Problem, shares: list[Share]) -> Solution:
    """SVD-LLM (Wang et al., 2024): the SVD of R W, RᵀR the inputs' second moment: least output error at its rank."""
    return _truncated(problem, shares, lambda target: target.whitened[0])


def _scaled(target: Target) -> Tensor:
    scale = target.metric.diagonal().sqrt() ** ALPHA
    return torch.linalg.svd(scale[:, None] * target.weight, full_matrices=False)[2].T


def _truncated(problem: Problem, shares: list[Share], vectors: Callable[[Target], Tensor]) -> Solution:
    weights, factors, macs = {}, [], 0
    for unit, rank in shares:
        (site,) = unit.sites
        target = problem.targets[site.name]
        V = vectors(target)[:, :rank]
        A, B = target.weight @ V, V.T
        weights[site.name] = A @ B
        factors += [A, B]
        macs += pair_macs(site, rank)
    return Solution(weights, factors, macs)
