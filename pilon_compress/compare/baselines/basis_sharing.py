"""Basis Sharing (Wang et al., 2025): neighbouring layers share the input side of their factors.

[W_1 … W_n] ≈ P [C_1 … C_n]        P (d_in, k) stored once, C_l (k, d_out) for every layer
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilon_compress.compare.baselines.equal_budget import Share, Unit, bias_numbers, groups
from pilon_compress.compare.baselines.problem import Problem, Solution, pair_macs
from pilon_compress.compare.baselines.registry import baseline
from pilon_compress.convert.calibrate.damping import damped_solve
from pilon_compress.convert.solve.eigen import eigenvectors
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.models.families import Site
from pilon_compress.report.methods import PlotStyle

GROUP = 2  # layers that share a basis; the paper's choice for most of its tables


def units(sites: Sequence[Site]) -> list[Unit]:
    """Groups of two layers and one role, down-projections alone as in the paper; a step is one basis vector."""
    private = [(site,) for site in sites if site.role == "down"]
    shared = groups([site for site in sites if site.role != "down"], GROUP)
    made = []
    for members in sorted([*shared, *private], key=lambda members: (members[0].layer, members[0].role)):
        d_in, outputs = members[0].d_in, sum(site.d_out for site in members)
        made.append(Unit(members, d_in + outputs, bias_numbers(members), min(d_in, outputs)))
    return made


@baseline(
    "basis-sharing",
    title="Basis Sharing",
    about="two neighbouring layers share the input side of their factors",
    paper="Wang et al., 2025",
    style=PlotStyle("#009E73", "P"),
    units=units,
)
def solve(problem: Problem, shares: list[Share]) -> Solution:
    """Whiten all layers of a group by the sum of their input moments, share the left singular vectors of all weights.

    The coefficients are then refitted to each layer's own moment; the paper refits them to the inputs that the
    compressed layers below produce, which takes a second calibration.
    """
    weights, factors, macs = {}, [], 0
    for unit, rank in shares:
        targets = [problem.targets[site.name] for site in unit.sites]
        basis = shared_basis(targets, rank)
        factors.append(basis)
        for site, target in zip(unit.sites, targets, strict=True):
            projected = basis.T @ target.metric
            coefficients = damped_solve(projected @ basis, projected @ target.weight, target.name)
            weights[site.name] = basis @ coefficients
            factors.append(coefficients)
            macs += pair_macs(site, rank)
    return Solution(weights, factors, macs)


def shared_basis(targets: Sequence[Target], rank: int) -> Tensor:
    """P (d_in, rank) = R⁻¹ U_k, with RᵀR = Σ_l C_l and U the left singular vectors of R [W_1 … W_n]."""
    if len(targets) == 1:  # the same space, decomposed already
        return targets[0].weight @ targets[0].whitened[0][:, :rank]
    values, vectors = eigenvectors(sum((t.metric for t in targets), torch.zeros_like(targets[0].metric)))
    root = values.clamp_min(values[-1] * 1e-12).sqrt()
    whitened = root[:, None] * (vectors.T @ torch.cat([t.weight for t in targets], 1))
    left = eigenvectors(whitened @ whitened.T)[1].flip(1)[:, :rank]
    return vectors @ (left / root[:, None])
