"""Published baselines, written from their papers' mathematics: what PILON is compared with at equal stored size.

Every method says what it buys with its budget (`units`) and solves for the weights at the sizes that it is dealt
(`solve`). Size, work and bias are counted and absorbed here, alike for all of them. Those of `rounded` keep all numbers
and save on their bits: no budget is dealt to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pilon_compress.compare.baselines import basis_sharing, nystrom, original_pilon, rtn_gptq, svd
from pilon_compress.compare.baselines.equal_budget import Share, Unit, deal
from pilon_compress.compare.baselines.problem import Problem, Solution
from pilon_compress.compare.baselines.rtn_gptq import ROUNDED
from pilon_compress.models.families import Site
from pilon_compress.nn.size import DENSE_ITEMSIZE


class Peer(NamedTuple):
    """A baseline: how it divides the model into units, and how it solves for them."""

    units: Callable[[Sequence[Site]], list[Unit]]
    solve: Callable[[Problem, list[Share]], Solution]


PEERS: dict[str, Peer] = {
    "svd": Peer(svd.units, svd.svd),
    "asvd": Peer(svd.units, svd.asvd),
    "whitened-svd": Peer(svd.units, svd.whitened_svd),
    "basis-sharing": Peer(basis_sharing.units, basis_sharing.solve),
    "nystrom": Peer(nystrom.units, nystrom.solve),
    "original-pilon": Peer(original_pilon.units, original_pilon.solve),
}


@dataclass(frozen=True)
class Approximation:
    """What a baseline makes of a model, by `Site.name`.

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


def shares(method: str, sites: Sequence[Site], ratio: float) -> list[Share]:
    """What `method` buys at a stored FFN ratio of at most `ratio`. Raises BadInput where that is nothing."""
    return deal(PEERS[method].units(sites), ratio, method)


def planned(method: str, sites: Sequence[Site], ratio: float) -> tuple[int, int]:
    """Numbers that will be stored, and bytes, known before anything is solved. Raises BadInput as `shares` does."""
    if method in ROUNDED:
        return sum(site.parameters for site in sites), rtn_gptq.size(method, sites)
    stored = sum(unit.fixed + unit.price * count for unit, count in shares(method, sites, ratio))
    return stored, stored * DENSE_ITEMSIZE


def approximate(method: str, problem: Problem, ratio: float) -> Approximation:
    """Run one baseline at a stored FFN ratio of at most `ratio`; at 1 and above each one does the best it can.

    Every bias absorbs the mean output error, b' = b + (W - Ŵ)ᵀ μ, whatever the method's paper does with it: but for
    rounding to the nearest, which is what it is because it has seen no text.
    """
    if method in ROUNDED:
        return _rounded(method, problem)
    solution = PEERS[method].solve(problem, shares(method, problem.sites, ratio))
    biases, losses = {}, {}
    stored = sum(factor.numel() for factor in solution.factors)
    for site in problem.sites:
        target, approximation = problem.targets[site.name], solution.weights[site.name]
        kept = solution.kept.get(site.name)
        if site.bias:
            biases[site.name] = _absorbing(problem, site, approximation)
            stored += site.d_out if kept is None else len(kept)
        if kept is not None:  # what nobody reads is no error
            approximation = target.weight.index_copy(1, kept, approximation[:, kept])
        losses[site.name] = max(0.0, target.output_loss(approximation))
    return Approximation(solution.weights, biases, stored, stored * DENSE_ITEMSIZE, solution.macs, losses)


def _rounded(method: str, problem: Problem) -> Approximation:
    weights = rtn_gptq.solve(method, problem)
    biased = [site for site in problem.sites if site.bias and ROUNDED[method][0] != "rtn"]
    biases = {site.name: _absorbing(problem, site, weights[site.name]) for site in biased}
    losses = {name: max(0.0, target.output_loss(weights[name])) for name, target in problem.targets.items()}
    macs = sum(site.d_in * site.d_out for site in problem.sites)
    return Approximation(weights, biases, *planned(method, problem.sites, 1.0), macs, losses)


def _absorbing(problem: Problem, site: Site, approximation: Tensor) -> Tensor:
    error = problem.targets[site.name].weight - approximation
    return problem.biases[site.name] + problem.moments[site.input].mean.double() @ error
