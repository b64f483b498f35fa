"""Describe a second moment in few numbers: factor analysis, a diagonal and a low-rank part.

    C (f, f) ≈ diag(variance) + factors factorsᵀ        factors (f, q), q much smaller than f

Neurons that go are predicted by those that stay through the q factors alone: with Woodbury's identity the least-squares
refit of `down` is a product with (m, q) and a system of q equations, at any size and in any order.
"""

import torch
from torch import Tensor

SWEEPS = 4  # of the diagonal and the low-rank part in turn
POWER_STEPS = 3  # of the subspace iteration, before the first sweep and in each
LEAST_SHARE = 0.005  # of a neuron's power that is its own, at least


def factorise(moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return variance (f,) and factors (f, rank) of a moment (f, f), fitted to the correlations; deterministic."""
    scale = moment.diagonal().clamp_min(1e-30).sqrt()
    correlation = moment / scale[:, None] / scale
    own = torch.full_like(scale, 0.5)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(moment), rank, generator=generator, dtype=torch.float64).to(moment)
    basis = torch.linalg.qr(basis).Q
    factors = torch.zeros_like(basis)
    for _ in range(SWEEPS):
        for _ in range(POWER_STEPS):
            basis = torch.linalg.qr(correlation @ basis - own[:, None] * basis).Q
        small = basis.T @ (correlation @ basis - own[:, None] * basis)
        values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
        factors = basis @ (vectors * values.clamp_min(0).sqrt())
        own = (1 - factors.square().sum(1)).clamp_min(LEAST_SHARE)
    return own * scale.square(), factors * scale[:, None]


def compensated(rows: Tensor, count: int, variance: Tensor, factors: Tensor) -> Tensor:
    """The first `count` of `rows` (f, o), refitted to make up for the others: X₁ + C₁₁⁻¹ C₁₂ X₂."""
    left, gone = factors[:count], factors[count:]
    weighed = left / variance[:count, None]
    system = left.T @ weighed
    system.diagonal().add_(1)
    return rows[:count] + weighed @ torch.linalg.solve(system, gone.T @ rows[count:])
