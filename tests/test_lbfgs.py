"""The minimiser: fast where a preconditioner helps, and never worse than its start."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pilon_compress.convert.sharing.lbfgs import minimise


@dataclass
class Bowl:
    """Σ h x⁴/4 + h x²/2, whose curvatures h span six orders; undefined beyond 10."""

    x: Tensor
    spent: list[Tensor]

    def __post_init__(self):
        self.h = torch.logspace(0, 6, len(self.x), dtype=torch.float64)
        self.spent.append(self.x)
        self.loss = float((self.h * (self.x**4 / 4 + self.x**2 / 2)).sum())
        if self.x.abs().max() > 10:
            self.loss = float("nan")

    @property
    def gradient(self):
        return self.h * (self.x**3 + self.x)

    def precondition(self, z):
        return z / self.h


@pytest.mark.parametrize("scale", [1.0, 9.0])
def test_the_loss_never_rises_and_the_budget_holds(scale):
    start = scale * torch.ones(20, dtype=torch.float64)
    losses = []
    for budget in (1, 2, 5, 20, 80):
        spent = []
        found = minimise(lambda x, spent=spent: Bowl(x, spent), start, budget, 0.0)
        assert len(spent) <= budget
        losses.append(Bowl(found, []).loss)
    assert losses == sorted(losses, reverse=True) and losses[0] == Bowl(start, []).loss
    assert losses[-1] < 1e-9 * losses[0]


def test_it_stops_where_nothing_is_left_to_gain():
    spent = []
    minimise(lambda x: Bowl(x, spent), torch.ones(20, dtype=torch.float64), 1000, 1e-3)
    assert len(spent) < 60
    assert torch.equal(minimise(lambda x: Bowl(x, []), torch.zeros(3), 50, 1e-3), torch.zeros(3))
