"""The dense weights in whole numbers, all of them kept: what people take first, and what error feedback adds.

    rtn-int4    every number to the nearest, scales clipped for the least squared error; knows no activations
    gptq-int4   the rows that are still free make up for those that are rounded, in the metric of the inputs
                (GPTQ, Frantar et al., 2023)

Scales are bfloat16, one for 64 rows of a column (int8: for all), and chosen alike for both.
"""

from collections.abc import Sequence

from torch import Tensor

from pilon_compress.compare.baselines.equal_budget import bias_numbers
from pilon_compress.compare.baselines.problem import Problem
from pilon_compress.convert.solve.gptq import nearest, round_matrix
from pilon_compress.models.families import Site
from pilon_compress.nn.integer import KINDS
from pilon_compress.nn.size import DENSE_ITEMSIZE

ROUNDED: dict[str, tuple[str, str]] = {f"{how}-{kind}": (how, kind) for how in ("rtn", "gptq") for kind in KINDS}


def solve(method: str, problem: Problem) -> dict[str, Tensor]:
    """The rounded weights (d_in, d_out), float64, by `Site.name`."""
    how, kind = ROUNDED[method]
    found = {}
    for name, target in problem.targets.items():
        made = nearest(target.weight[None], kind) if how == "rtn" else round_matrix(target, kind)
        found[name] = made.values[0]
    return found


def size(method: str, sites: Sequence[Site]) -> int:
    """Bytes of codes, scales and biases."""
    kind = KINDS[ROUNDED[method][1]]
    return sum(sum(kind.size(site.d_in, site.d_out)) for site in sites) + DENSE_ITEMSIZE * bias_numbers(sites)
