"""Settle which primitives each layer of a band selects: components by their worth, primitives by what they hold."""

import torch
from torch import Tensor

from pilon_compress.convert.sharing.grouping import group
from pilon_compress.convert.sharing.objective import Band, Point


def choose(band: Band, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Order (K,) of the components of x, primitive by primitive, and those of each layer's primitives, active (L, K).

    A component's worth to a layer is the loss that its absence would cost, next to nothing being left to cancel: the
    power that it brings. Components that the same layers need go into one primitive, and every layer selects the
    primitives of most worth.
    """
    plan = band.plan
    worth = component_worth(band, x)
    layers, count = worth.shape
    needed = torch.zeros_like(worth).scatter(1, worth.topk(min(count, plan.top_k * plan.rank), dim=1).indices, 1.0)
    order = group(worth * needed, plan.rank, seed) if plan.rank > 1 else torch.arange(count, device=x.device)
    held = worth[:, order].reshape(layers, plan.n_primitives, plan.rank).sum(2)
    selected = torch.zeros_like(held, dtype=torch.bool).scatter(1, held.topk(plan.top_k, dim=1).indices, True)
    return order, selected.repeat_interleave(plan.rank, dim=1)


def component_worth(band: Band, x: Tensor) -> Tensor:
    """Return (L, K): the power of each component in each layer's output, in units of the band's loss."""
    point = Point(band, x, torch.ones(len(band.targets), x.shape[1], dtype=torch.bool, device=x.device))
    rows = []
    for (g, *_), C, G in zip(point.parts, band.C, band.G, strict=True):
        M = ((C @ point.A) * point.A).sum(0)
        N = ((point.B @ G) * point.B).sum(1)
        rows.append(g.square() * M * N)
    return torch.stack(rows)
