"""A baseline of your own: magnitude pruning. The smallest weights become zero; a bit mask says which ones are left.

    PILON_PLUGINS=baseline.py pilon-compress compare gpt2 --methods pilon,magnitude,svd -o out/compared

This file is all: what a step of the budget buys, what it weighs in bytes, and the function that solves.
"""

from collections.abc import Sequence

import torch

from pilon_compress.compare.baselines.equal_budget import Share, Unit, bias_numbers
from pilon_compress.compare.baselines.problem import Problem, Solution
from pilon_compress.compare.baselines.registry import baseline
from pilon_compress.models.families import Site
from pilon_compress.nn.size import DENSE_ITEMSIZE
from pilon_compress.report.methods import PlotStyle


def units(sites: Sequence[Site]) -> list[Unit]:
    """Every projection on its own; a step of the budget is one weight that stays. Biases are stored in any case."""
    return [Unit((site,), 1, bias_numbers([site]), site.d_in * site.d_out) for site in sites]


def size(sites: Sequence[Site], shares: list[Share]) -> int:
    """Bytes of the weights that stay and of the biases, in bfloat16, and of a bit for every place."""
    numbers = sum(unit.fixed + unit.price * count for unit, count in shares)
    return numbers * DENSE_ITEMSIZE + sum(-(-site.d_in * site.d_out // 8) for site in sites)


@baseline(
    "magnitude",
    title="magnitude pruning",
    about="the smallest weights of every matrix are set to zero; multiply-accumulates stay those of the dense matrix",
    paper="Han et al., 2015",
    style=PlotStyle("#6b4226", "1", "-"),
    units=units,
    size=size,
)
def solve(problem: Problem, shares: list[Share]) -> Solution:
    """Keep, of every matrix, the `count` weights of the largest magnitude."""
    weights, factors, macs = {}, [], 0
    for unit, count in shares:
        (site,) = unit.sites
        dense = problem.weights[site.name].flatten()
        places = dense.abs().topk(count).indices
        weights[site.name] = torch.zeros_like(dense).index_copy(0, places, dense[places]).view(site.d_in, site.d_out)
        factors.append(dense[places])
        macs += site.d_in * site.d_out
    return Solution(weights, factors, macs)
