"""Runs one baseline and counts what it stores, by the same rules for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pilon_compress.compare.baselines.problem import Problem
from pilon_compress.compare.baselines.registry import BASELINES
from pilon_compress.models.families import Site


@dataclass(frozen=True)
class Approximation:
    """The weights that a baseline puts in the place of a model's, by `Site.name`.

    weights (d_in, d_out) and biases (d_out,), float64   stored: numbers kept, biases included   bytes: of those
    macs: per token
    losses: relative squared output error of each site, as `Target.output_loss`
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    stored: int
    bytes: int
    macs: int
    losses: dict[str, float]


def planned(method: str, sites: Sequence[Site], ratio: float) -> tuple[int, int]:
    """Return the numbers and the bytes that `method` will store. Raises BadInput where `ratio` is too small for it."""
    return BASELINES[method].planned(sites, ratio)


def approximate(method: str, problem: Problem, ratio: float) -> Approximation:
    """Run one baseline at a stored FFN ratio of at most `ratio`; at 1 and above each one does the best it can.

    Every bias absorbs the mean output error, b' = b + (W - Ŵ)ᵀ μ, whatever the method's paper does with it: but for
    methods that see no text (`Baseline.absorbs`).
    """
    baseline = BASELINES[method]
    shares = baseline.shares(problem.sites, ratio)
    solution = baseline.solve(problem, shares)
    biases, losses = {}, {}
    stored = sum(factor.numel() for factor in solution.factors)
    for site in problem.sites:
        target, approximation = problem.targets[site.name], solution.weights[site.name]
        kept = solution.kept.get(site.name)
        if site.bias:
            stored += site.d_out if kept is None else len(kept)
            if baseline.absorbs:
                biases[site.name] = _absorbing(problem, site, approximation)
        if kept is not None:  # outputs of dropped neurons are not counted as error
            approximation = target.weight.index_copy(1, kept, approximation[:, kept])
        losses[site.name] = max(0.0, target.output_loss(approximation))
    size = baseline.bytes(problem.sites, shares, stored)
    return Approximation(solution.weights, biases, stored, size, solution.macs, losses)


def _absorbing(problem: Problem, site: Site, approximation: Tensor) -> Tensor:
    error = problem.targets[site.name].weight - approximation
    return problem.biases[site.name] + problem.moments[site.input].mean.double() @ error
