"""The joint fit: one bank for the layers of a band, each layer judged by its own two-sided metric.

    minimise  Σ_l  tr((W_l - A diag(g_l) B)ᵀ C_l (W_l - A diag(g_l) B) G_l)
    A (d_in, K)   B (K, d_out)   g (L, K), zero outside the primitives that layer l selects;   K = n·r

It starts from the layers' own best factors side by side (g one-hot, the budget-matched private solution), a saddle
that a little noise on g leaves quickly. L-BFGS over A and B, with g the best for them, goes on from there. Which
primitives a layer may use is settled at the start; a layer that may use no more than its own is best as it is, by
Eckart and Young. In the end the private start is returned instead if the fit is not better.
"""

from collections.abc import Sequence

import torch

from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.sharing.grouping import group
from pilon_compress.convert.sharing.lbfgs import minimise
from pilon_compress.convert.sharing.objective import Band, Point
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
    plan = band.plan
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE * torch.randn(start.g.shape, generator=generator).to(start.g.device)
    if plan.composition == "scalar":
        noise = noise[:, :: plan.rank].repeat_interleave(plan.rank, dim=1)
    A, B = band.whitened(start.A, start.B)
    g = band.compose(A, B, start.active)
    A, B = band.alternate(A, B, g + noise.float() * start.active.repeat_interleave(plan.rank, dim=1))
    x = minimise(lambda x: Point(band, x, start.active), torch.cat([A, B.T]), EVALUATIONS * max(1, sweeps), tolerance)
    A, B = band.original(x[: len(A)], x[len(A) :].T)
    found = Factors(A, B, compose(band.targets, A, B, start.active, plan), start.active)
    if plan.top_k < plan.n_primitives or plan.composition == "scalar":
        return found
    order = group(usage(band.targets, found), plan.rank, seed)  # all are active, so they may be primitives in any way
    return Factors(A[:, order], B[order], found.g[:, order], start.active)
