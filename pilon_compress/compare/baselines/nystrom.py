"""Neuron selection by the Nyström formula: MoDeGPT's treatment of the feed-forward block (Lin et al., 2025, type I)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilon_compress.compare.baselines.equal_budget import Share, Unit, bias_numbers
from pilon_compress.compare.baselines.problem import Problem, Solution
from pilon_compress.compare.baselines.registry import baseline
from pilon_compress.convert.calibrate.damping import damped_inverse, damped_solve
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site
from pilon_compress.report.methods import PlotStyle

RIDGE = 1.0  # of the mean eigenvalue; any from 0.3 to 10 will do, 0.1 drops a neuron that others lean on (docs/results)


def units(sites: Sequence[Site]) -> list[Unit]:
    """The feed-forward block of every layer; a step is one inner neuron.

    Raises BadInput for a layer without a down-projection, or with none that feeds it.
    """
    made = []
    for layer in sorted({site.layer for site in sites}):
        members = tuple(sorted((s for s in sites if s.layer == layer), key=lambda site: site.role == "down"))
        *ups, down = members
        if down.role != "down" or not ups or any(up.d_out % down.d_in for up in ups):
            raise BadInput(f"nystrom keeps whole neurons, and layer {layer} has no pair of up- and down-projections")
        wide = sum((up.d_out // down.d_in) * (up.d_in + up.bias) for up in ups)  # a fused gate_up has two columns each
        made.append(Unit(members, wide + down.d_out, bias_numbers([down]), down.d_in))
    return made


@baseline(
    "nystrom",
    title="Nyström neurons (MoDeGPT)",
    about="whole neurons are dropped and the down-projection makes up for them; what stays of up and gate is exact, so "
    "all of its loss is in down",
    paper="Lin et al., 2025",
    style=PlotStyle("#D55E00", "v"),
    units=units,
)
def solve(problem: Problem, shares: list[Share]) -> Solution:
    """Keep the neurons of the largest ridge leverage; the rows of `down` make up for the others as well as they can."""
    weights, factors, kept, macs = {}, [], {}, 0
    for unit, count in shares:
        *ups, down = unit.sites
        target = problem.targets[down.name]
        neurons = select(target.metric, count)
        for up in ups:
            offsets = torch.arange(up.d_out // down.d_in, device=neurons.device)[:, None] * down.d_in
            kept[up.name] = columns = (offsets + neurons).flatten()
            stays = problem.weights[up.name][:, columns]
            weights[up.name] = torch.zeros_like(problem.weights[up.name]).index_copy(1, columns, stays)
            factors.append(stays)
        rows = corrected(target, neurons)
        weights[down.name] = torch.zeros_like(target.weight).index_copy(0, neurons, rows)
        factors.append(rows)
        macs += sum(factor.numel() for factor in factors[-len(unit.sites) :])
    return Solution(weights, factors, macs, kept)


def select(moment: Tensor, count: int) -> Tensor:
    """Indices (count,), ascending, of the largest ridge leverage scores [C (C + λI)⁻¹]_ii of a moment C (d, d)."""
    ridge = RIDGE * moment.diagonal().mean()
    damped = moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    scores = 1 - ridge * damped_inverse(damped).diagonal()
    return scores.topk(count).indices.sort().values


def corrected(target: Target, neurons: Tensor) -> Tensor:
    """(SᵀCS)⁻¹ SᵀC W, (count, d_out): the rows of `down` with the least output error for the neurons S that stay."""
    C = target.metric[neurons]
    return damped_solve(C[:, neurons], C @ target.weight, target.name)
