"""The joint fit: one bank for the layers of a band, each layer judged by its own two-sided metric.

    minimise  Σ_l  tr((W_l - A diag(g_l) B)ᵀ C_l (W_l - A diag(g_l) B) G_l)
    A (d_in, K)   B (K, d_out)   g (L, K), zero outside the primitives that layer l selects;   K = n·r

It starts from the layers' own best factors side by side (g one-hot, the budget-matched private solution), a saddle
that a little noise on g leaves quickly. L-BFGS over A and B, with g the best for them, goes on from there. At first
every layer uses every component; half way each settles on the primitives that bring it most (`selection`). A layer that
may use no more than its own is best as it is, by Eckart and Young. In the end the private start is returned instead if
the fit is not better.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.sharing.grouping import group
from pilon_compress.convert.sharing.lbfgs import minimise
from pilon_compress.convert.sharing.objective import Band, Point
from pilon_compress.convert.sharing.selection import choose
from pilon_compress.convert.solve.bank_fit import (
    BankFit,
    Factors,
    compose,
    fit_private,
    losses,
    packed,
    private_factors,
    usage,
)
from pilon_compress.convert.solve.low_rank import Target

NOISE = 0.3  # on g at the start; without it the first ten sweeps gain next to nothing (docs/log.md)
EVALUATIONS = 4  # of loss and gradient per sweep: a little more than an alternation over A, B and g costs
NEGLIGIBLE = 1e-12  # loss of the private start, relative to the zero matrix's, that nothing can lower


def fit_bank(
    targets: Sequence[Target], plan: BankPlan, seed: int = 0, sweeps: int = 24, tolerance: float = 2e-3
) -> BankFit:
    """Fit one bank to the `targets` of a band. Deterministic for a seed; never worse than the private start.

    `sweeps` bounds its length, one being EVALUATIONS of the band's loss; it ends early once two of them lower the loss
    by less than `tolerance` of it.
    """
    if len(targets) == 1:
        return fit_private(targets, plan)
    start, private_losses = private_factors(targets, plan)
    best, best_losses = start, losses(targets, start)
    total = sum(target.total for target in targets)
    shares = bool((start.active.sum(0) > 1).any())
    if shares and sum(private_losses) > NEGLIGIBLE * total:
        fitted = _joint(Band(targets, plan), start, seed, sweeps, tolerance)
        fitted_losses = losses(targets, fitted)
        if sum(fitted_losses) < sum(best_losses):
            best, best_losses = fitted, fitted_losses
    return packed(targets, best, plan, best_losses, private_losses)


def _joint(band: Band, start: Factors, seed: int, sweeps: int, tolerance: float) -> Factors:
    """Fit all components for all layers, settle what each layer uses, and fit those."""
    plan, everything = band.plan, torch.ones_like(start.active)
    x = _begin(band, *band.whitened(start.A, start.B), everything, seed)
    budget = EVALUATIONS * max(1, sweeps)
    if plan.top_k == plan.n_primitives:
        return _grouped(band, _finish(band, _descend(band, x, everything, budget, tolerance), everything), seed)
    x = _descend(band, x, everything, budget // 2, tolerance)
    order, active = choose(band, x, seed)
    return _finish(band, _descend(band, x[:, order], active, budget - budget // 2, tolerance), active)


def fit_components(band: Band, seed: int, sweeps: int, tolerance: float = 2e-3) -> tuple[Tensor, float]:
    """Fit a bank whose components all layers use: x (d_in + d_out, K) and its loss, all layers' dense power being 1."""
    start, _ = private_factors(band.targets, band.plan)
    everything = torch.ones_like(start.active)
    x = _begin(band, *band.whitened(start.A, start.B), everything, seed)
    x = _descend(band, x, everything, EVALUATIONS * max(1, sweeps), tolerance)
    return x, band.scale * sum(losses(band.targets, _finish(band, x, everything)))


def _begin(band: Band, A: Tensor, B: Tensor, active: Tensor, seed: int) -> Tensor:
    """Leave the saddle of private factors by noise on g and one alternation; returns x (d_in + d_out, K)."""
    plan = band.plan
    noise = NOISE * torch.randn(active.shape, generator=torch.Generator().manual_seed(seed)).to(A.device)
    if plan.composition == "scalar":
        noise = noise[:, :: plan.rank].repeat_interleave(plan.rank, dim=1)
    g = band.compose(A, B, active)
    A, B = band.alternate(A, B, g + noise.float() * active)
    return torch.cat([A, B.T])


def _descend(band: Band, x: Tensor, active: Tensor, evaluations: int, tolerance: float) -> Tensor:
    return minimise(lambda x: Point(band, x, active), x, evaluations, tolerance)


def _finish(band: Band, x: Tensor, active: Tensor) -> Factors:
    """The components in the original coordinates, in float64, with the best g."""
    A, B = band.original(x[: len(band.C[0])], x[len(band.C[0]) :].T)
    return Factors(A, B, compose(band.targets, A, B, active, band.plan), active)


def _grouped(band: Band, found: Factors, seed: int) -> Factors:
    """Put components that layers use alike into one primitive: all are active, so any order is a valid one."""
    if band.plan.composition == "scalar" or band.plan.rank == 1:
        return found
    order = group(usage(band.targets, found), band.plan.rank, seed)
    return Factors(found.A[:, order], found.B[order], found.g[:, order], found.active)
