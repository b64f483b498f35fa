"""Prune neurons of a feed-forward block one after another, with `down` refitted to compensate.

    y = act(x W_up) W_down        neuron j: column j of up (and gate), row j of down

Without neuron j the others predict it as well as they can, by least squares on the calibration text, and `down`
absorbs the prediction. The cost in the two-sided metric of `down`,

    (w_j G w_jᵀ) / [C⁻¹]_jj        w_j row of the current down, C moments of the neurons, G of the output's gradients

is the optimal brain surgeon's (Hassibi and Stork, 1993) for whole rows, as in ZipLM (Kurtic et al., 2023); MoDeGPT (Lin
et al., 2025) drops neurons by their leverage in C alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pilon_compress.convert.calibrate.damping import damped_cholesky, damped_inverse, damped_solve

COMPACT_BELOW = 0.75  # compact W and C once fewer of their rows belong to remaining neurons
NEURONS_PER_STEP = 0.03  # share of the remaining neurons: their joint loss is exact, the selection greedy


@dataclass(frozen=True)
class Elimination:
    """`order` (f,): neurons, first to go first. `cost` (f,): loss of `down` once that many + 1 of them are gone."""

    order: Tensor
    cost: Tensor

    def left(self, count: int) -> Tensor:
        """The `count` neurons that stay longest, ascending."""
        return self.order[len(self.order) - count :].sort().values

    def loss(self, count: int) -> float:
        """Loss of `down` with `count` neurons left."""
        return float(self.cost[len(self.order) - count - 1]) if count < len(self.order) else 0.0


def eliminate(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Elimination:
    """Order the neurons of a `down` weight (f, d_out) under the metrics `inputs` (f, f) and `gradients` (d_out, d_out).

    A few per cent of the neurons go at a time, those of the least cost each.
    Cost grows as f³.
    """
    W = weight @ damped_cholesky(gradients)  # rows in a frame where G is the identity
    C = damped_inverse(inputs)
    names = torch.arange(len(W), device=W.device)  # of the rows that W and C still have
    alive = torch.ones(len(W), dtype=torch.bool, device=W.device)
    count = len(W)
    order: list[Tensor] = []
    costs: list[float] = []
    total = 0.0
    while count:
        size = max(1, int(NEURONS_PER_STEP * count))
        single = (W.square().sum(1) / C.diagonal().clamp_min(1e-300)).masked_fill(~alive, torch.inf)
        gone = single.topk(size, largest=False).indices
        rows, side = W[gone], C[:, gone]
        lift = damped_solve(side[gone], torch.cat([rows, side.T], 1))
        joint = float((lift[:, : W.shape[1]] * rows).sum())
        steps = single[gone].clamp_min(0).cumsum(0)
        share = steps / steps[-1] if steps[-1] > 0 else torch.ones_like(steps)
        costs += (total + max(0.0, joint) * share).tolist()
        total = costs[-1]
        order.append(names[gone])
        alive[gone] = False
        count -= size
        if count <= COMPACT_BELOW * len(
            W
        ):  # copies cost as much as the products: rows of the gone are zero, and may stay
            kept = alive.nonzero()[:, 0]
            names, alive, W, C, side = names[kept], alive[kept], W[kept], C[kept[:, None], kept], side[kept]
            lift = torch.cat([lift[:, : W.shape[1]], lift[:, W.shape[1] :][:, kept]], 1)
        W.addmm_(side, lift[:, : W.shape[1]], alpha=-1)
        C.addmm_(side, lift[:, W.shape[1] :], alpha=-1)
    return Elimination(torch.cat(order), torch.tensor(costs, dtype=torch.float64))


def refit(weight: Tensor, inputs: Tensor, left: Tensor) -> Tensor:
    """Rows (m, d_out) of `down` for the neurons `left` (m,) with the least output error: (SᵀCS)⁻¹ SᵀC W."""
    C = inputs[left]
    return torch.cholesky_solve(C @ weight, damped_cholesky(C[:, left]))
