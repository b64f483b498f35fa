"""Register baselines: name, title and explanation, and the functions that size it and solve for it.

    @baseline("svd", title="svd", about="...", paper="Eckart, Young 1936", style=PlotStyle("#CC79A7", "^"), units=units)
    def svd(problem, shares):
        ...
        return Solution(weights, factors, macs)

Two kinds of baselines differ in what they save. With `units` a method is dealt a budget of stored numbers and compared
at equal numbers. Without, it keeps every number, saves on their bits (`size`), and is compared by bytes alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pilon_compress.compare.baselines.equal_budget import Share, Unit, deal
from pilon_compress.compare.baselines.problem import Problem, Solution
from pilon_compress.models.families import Site
from pilon_compress.nn.size import DENSE_ITEMSIZE
from pilon_compress.plugins import Registry
from pilon_compress.report.methods import METHODS, Curve, Method, PlotStyle

Solve = Callable[[Problem, list[Share]], Solution]
Units = Callable[[Sequence[Site]], list[Unit]]
SizeInBytes = Callable[[Sequence[Site], list[Share]], int]


@dataclass(frozen=True)
class Baseline:
    """A published method.

    paper: authors and year, empty if none   units: what it divides the model into, None if it keeps all numbers
    size: bytes that it stores, by sites and shares; None: all numbers in bfloat16
    absorbs: biases take up the mean output error; False for methods that see no text
    """

    name: str
    paper: str
    solve: Solve
    units: Units | None = None
    size: SizeInBytes | None = None
    absorbs: bool = True

    def shares(self, sites: Sequence[Site], ratio: float) -> list[Share]:
        """Deal a stored FFN ratio of at most `ratio` to the units. Raises BadInput where a unit would get nothing."""
        return [] if self.units is None else deal(self.units(sites), ratio, self.name)

    def planned(self, sites: Sequence[Site], ratio: float) -> tuple[int, int]:
        """Return stored numbers and bytes, known before anything is solved. Raises BadInput as `shares` does."""
        shares = self.shares(sites, ratio)
        if self.units is None:
            stored = sum(site.parameters for site in sites)
        else:
            stored = sum(unit.fixed + unit.price * count for unit, count in shares)
        return stored, self.bytes(sites, shares, stored)

    def bytes(self, sites: Sequence[Site], shares: list[Share], stored: int) -> int:
        """Return the bytes of `stored` numbers."""
        return stored * DENSE_ITEMSIZE if self.size is None else self.size(sites, shares)


BASELINES: Registry[Baseline] = Registry("baseline", "pilon_compress.compare.baselines")


def baseline(
    name: str,
    *,
    title: str,
    about: str,
    paper: str = "",
    style: PlotStyle,
    curve: str = "",
    curve_title: str = "",
    units: Units | None = None,
    size: SizeInBytes | None = None,
    absorbs: bool = True,
) -> Callable[[Solve], Solve]:
    """Register the decorated function as the baseline `name`; see `Baseline` for `paper` and what follows `style`.

    `title` stands in tables, `about` (one clause) on the page, `style` in plots. Baselines that differ in their bits
    alone share the `curve` of that name, which is called `curve_title`. Raises BadInput for a name that is taken.
    """

    def register(solve: Solve) -> Solve:
        BASELINES.add(name, Baseline(name, paper, solve, units, size, absorbs))
        line = Curve(curve or name, curve_title or title, f"{about} ({paper})" if paper else about, style)
        METHODS.add(name, Method(name, title, line))
        return solve

    return register
