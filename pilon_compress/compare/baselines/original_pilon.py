"""The original PILON: primitives cut from the SVD of a band's mean weight, mixed by softmax top-k, no activations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilon_compress.compare.baselines.equal_budget import Share, Unit, bias_numbers, groups
from pilon_compress.compare.baselines.problem import Problem, Solution, pair_macs
from pilon_compress.compare.baselines.registry import baseline
from pilon_compress.models.families import Site
from pilon_compress.report.methods import PlotStyle

BAND = 3  # layers that share a bank
WIDEST = 16  # rank of a primitive, less for small matrices
SELECTED = 6  # a layer mixes one primitive in six of its bank: 8 of 48
STEPS = 2000
CONVERGED = 1e-12  # largest change of a weight between steps; weights sum to 1


def units(sites: Sequence[Site]) -> list[Unit]:
    """Bands of three layers and one role; a step is one primitive, with a logit for every layer of the band."""
    made = []
    for members in groups(sites, BAND):
        first = members[0]
        rank = _rank(first)
        most = len(members) * -(-min(first.d_in, first.d_out) // rank)
        price = rank * (first.d_in + first.d_out) + len(members)
        made.append(Unit(members, price, bias_numbers(members), most))
    return made


@baseline(
    "original-pilon",
    title="original PILON",
    about="primitives from a band's mean weight, mixed by softmax top-k, no activations",
    paper="the original implementation",
    style=PlotStyle("#8a8f98", "X", ":"),
    units=units,
)
def solve(problem: Problem, shares: list[Share]) -> Solution:
    """Cut the mean weight of each band into primitives; fit each layer's mixture to its weight, top-k of it."""
    weights, factors, macs = {}, [], 0
    for unit, count in shares:
        rank, top_k = _rank(unit.sites[0]), -(-count // SELECTED)
        members = [problem.weights[site.name] for site in unit.sites]
        U, S, Vh = torch.linalg.svd(torch.stack(members).mean(0), full_matrices=False)
        windows = _windows(count, rank, len(S)).to(S.device)
        A, B = U * S.sqrt(), S.sqrt()[:, None] * Vh
        factors += [A[:, windows], B[windows]]
        inside = torch.zeros(count, len(S), dtype=S.dtype, device=S.device).scatter_(1, windows, 1.0)
        gram = (inside * S.square()) @ inside.T
        for site, weight in zip(unit.sites, members, strict=True):
            right = inside @ (S * torch.einsum("is,io,so->s", U, weight, Vh))
            mixture = simplex_fit(gram, right, top_k)
            factors.append(mixture)
            weights[site.name] = (A * (mixture @ inside)) @ B
            macs += pair_macs(site, top_k * rank)
    return Solution(weights, factors, macs)


def simplex_fit(gram: Tensor, right: Tensor, top_k: int) -> Tensor:
    """w (n,) of least wᵀGw - 2wᵀb among the convex mixtures of `top_k` primitives: what softmax weights can say.

    The primitives are those that the best mixture of all gives most weight.
    """
    w = _descend(gram, right, torch.ones_like(right, dtype=torch.bool))
    chosen = torch.zeros_like(right, dtype=torch.bool).scatter(0, w.topk(top_k).indices, True)
    return _descend(gram, right, chosen)


def _descend(gram: Tensor, right: Tensor, free: Tensor) -> Tensor:
    """Accelerated projected gradients, until nothing moves any more."""
    w = ahead = free.to(right.dtype) / free.sum()
    step = 1 / torch.linalg.matrix_norm(gram, 2)
    for index in range(STEPS):
        following = _onto_simplex(torch.where(free, ahead - step * (gram @ ahead - right), -torch.inf))
        ahead = following + index / (index + 3) * (following - w)
        moved, w = float((following - w).abs().max()), following
        if moved < CONVERGED:
            break
    return w


def _onto_simplex(x: Tensor) -> Tensor:
    """The nearest point with entries of at least 0 that sum to 1; entries of minus infinity stay out."""
    ordered = x.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    return (x - excess[ordered > excess][-1]).clamp_min(0)


def _rank(site: Site) -> int:
    return max(1, min(WIDEST, min(site.d_in, site.d_out) // 8))


def _windows(count: int, rank: int, width: int) -> Tensor:
    """(count, rank) singular directions of each primitive: in turn while they last, else evenly overlapping."""
    spacing = min(rank, (width - rank) / max(1, count - 1))
    starts = (torch.arange(count) * spacing).round().long()
    return starts[:, None] + torch.arange(rank)
