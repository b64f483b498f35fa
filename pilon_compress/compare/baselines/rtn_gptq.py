"""The dense weights quantised, none of them dropped: what people take first, and what error feedback adds.

    rtn-int4    every number to the nearest, scales clipped for the least squared error; knows no activations
    gptq-int4   the rows that are still free make up for those that are rounded, in the metric of the inputs

Scales are bfloat16, one for 64 rows of a column (int8: for all), and chosen alike for both.
"""

from collections.abc import Sequence

from torch import Tensor

from pilon_compress.compare.baselines.equal_budget import Share, bias_numbers
from pilon_compress.compare.baselines.problem import Problem, Solution
from pilon_compress.compare.baselines.registry import baseline
from pilon_compress.convert.solve.gptq import nearest, round_matrix
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.models.families import Site
from pilon_compress.nn.formats.registry import grid_of, grids
from pilon_compress.nn.size import DENSE_ITEMSIZE
from pilon_compress.report.methods import PlotStyle


def size(kind: str, sites: Sequence[Site]) -> int:
    """Bytes of the codes of `kind`, a number format, of their scales, and the biases."""
    codes_and_scales = sum(sum(grid_of(kind).size(site.d_in, site.d_out)) for site in sites)
    return codes_and_scales + DENSE_ITEMSIZE * bias_numbers(sites)


def rtn(target: Target, kind: str) -> Tensor:
    """Return the weight (d_in, d_out) with every number rounded to the nearest."""
    return nearest(target.weight[None], kind).values[0]


def gptq(target: Target, kind: str) -> Tensor:
    """Return the weight (d_in, d_out) rounded row by row, each error fed to the rows that are still free."""
    return round_matrix(target, kind).values[0]


def solution(problem: Problem, weights: dict[str, Tensor]) -> Solution:
    """Return quantised weights (d_in, d_out), by `Site.name`, as the solution of a method that drops no number."""
    macs = sum(site.d_in * site.d_out for site in problem.sites)
    return Solution(weights, list(weights.values()), macs)


def _register(kind: str) -> None:
    """Register both ways to round to the number format `kind`."""

    def bytes_of(sites: Sequence[Site], shares: list[Share]) -> int:
        return size(kind, sites)

    @baseline(
        f"rtn-{kind}",
        title=f"round to nearest, {kind}",
        about="all dense weights quantised, every one on its own; knows no activations",
        style=PlotStyle("#a0522d", "D", ":"),
        curve="rtn",
        curve_title="round to nearest",
        size=bytes_of,
        absorbs=False,
    )
    def to_nearest(problem: Problem, shares: list[Share]) -> Solution:
        return solution(problem, {name: rtn(target, kind) for name, target in problem.targets.items()})

    @baseline(
        f"gptq-{kind}",
        title=f"GPTQ, {kind}",
        about="all dense weights quantised; rows that are still free make up for the rounded ones, in the metric of "
        "the inputs",
        paper="Frantar et al., 2023",
        style=PlotStyle("#b5651d", "d", "--"),
        curve="gptq",
        curve_title="GPTQ",
        size=bytes_of,
    )
    def with_feedback(problem: Problem, shares: list[Share]) -> Solution:
        return solution(problem, {name: gptq(target, kind) for name, target in problem.targets.items()})


for _kind in grids():
    _register(_kind)
