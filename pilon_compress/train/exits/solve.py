"""Solve one block's exit from its records: the substitute for its output, the price of it at each token, the gate.

substitute   least squares from inputs to outputs, cut to its rank where the gradients weigh errors most;
             first on all tokens, then on those that are cheap to skip
price        ½ mean (g · (substitute - output))², with a substitute that was fitted on other tokens
gate         w, b so that x·w + b is the log of the expected price: g · δ is normal with a variance that is the
             price, so that prices are gamma-distributed and maximum likelihood is a regression with a log link
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pilon_compress.nn.exits import ExitGate

RIDGE = 1e-2  # of the mean variance of inputs, and of standardised ones
CHEAP = 1 / 3  # share of a block's tokens that its substitute is fitted on at last
FEW = 16  # tokens that a substitute is fitted on at least
STEPS = 60  # of Fisher scoring; it converges in ten or so
FLAT = 1e-6  # gain of a step, in nats per token, at which the regression ends


@dataclass(frozen=True)
class Solved:
    """An exit: its gate, whose threshold is still to be set, and the log prices (N,) that it predicts."""

    gate: ExitGate
    scores: Tensor


@dataclass(frozen=True)
class Substitute:
    """A linear map of rank r and a constant, x -> (x · down) · up + mean; without a map the constant alone."""

    mean: Tensor
    down: Tensor | None = None
    up: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.down is None or self.up is None:
            return self.mean.expand_as(x)
        return (x @ self.down) @ self.up + self.mean


def solve(x: Tensor, y: Tensor, gradients: Tensor, rank: int, work: float) -> Solved:
    """Return the exit of a block from inputs x and outputs y (N, d) and gradients (K, N, d).

    `work`: the block's MACs over those of the mean block, by which prices are divided: skipping more may cost more.
    """
    pulls = gradients.flatten(0, 1)
    metric = Metric.of((pulls.T @ pulls).double())
    folds = torch.arange(len(x), device=x.device) // 64 % 2 == 0  # runs, so that neighbours are in one fold
    every = torch.ones_like(folds)
    prices = _prices(x, y, gradients, folds, every, rank, metric) / work
    weight, bias = fit_gate(x, prices)
    cheap = (x.double() @ weight + bias).argsort()[: max(2, int(CHEAP * len(x)))]
    chosen = torch.zeros_like(folds).index_fill(0, cheap, True)
    prices = _prices(x, y, gradients, folds, chosen, rank, metric) / work
    weight, bias = fit_gate(x, prices)
    final = substitute(x[chosen], y[chosen], rank, metric)
    gate = ExitGate(x.shape[1], substitute=rank)
    gate.weight, gate.bias, gate.mean = weight.float(), bias.float().reshape(1), final.mean
    if final.down is not None and final.up is not None:
        gate.down, gate.up = final.down, final.up
    return Solved(gate, x @ gate.weight + gate.bias)


def _prices(
    x: Tensor, y: Tensor, gradients: Tensor, folds: Tensor, chosen: Tensor, rank: int, metric: "Metric"
) -> Tensor:
    """Prices (N,) of skipping with substitutes that were fitted on the `chosen` tokens of the other fold."""
    prices = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for fold in (folds, ~folds):
        there = chosen & ~fold
        there = there if int(there.sum()) >= FEW else ~fold
        change = substitute(x[there], y[there], rank, metric)(x[fold]) - y[fold]
        prices[fold] = 0.5 * (gradients[:, fold] * change).sum(-1).double().square().mean(0)
    return prices


class Metric(NamedTuple):
    """Symmetric square root of the gradients' second moment (d, d), by which errors of outputs weigh; its inverse."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, second: Tensor) -> "Metric":
        """Return the metric of a second moment (d, d), whose least eigenvalues are raised."""
        values, vectors = torch.linalg.eigh(second)
        values = values.clamp_min(RIDGE * float(values.mean().clamp_min(1e-30))).sqrt()
        return cls((vectors * values) @ vectors.T, (vectors / values) @ vectors.T)


def substitute(x: Tensor, y: Tensor, rank: int, metric: Metric) -> Substitute:
    """Fit the substitute of a rank (0: the mean of y) to inputs x and outputs y (N, d); errors weigh by `metric`."""
    if not rank:
        return Substitute(y.mean(0))
    centre, mean = x.mean(0), y.mean(0)
    inputs, outputs = x - centre, y - mean
    second = (inputs.T @ inputs).double() / len(x)
    second += RIDGE * second.diagonal().mean().clamp_min(1e-12) * torch.eye(len(second)).to(second)
    whole = torch.linalg.solve(second, (inputs.T @ outputs).double() / len(x))
    weighted = whole @ metric.root
    best = torch.linalg.eigh(weighted.T @ second @ weighted).eigenvectors[:, -rank:]
    down, up = weighted @ best, best.T @ metric.inverse
    constant = mean.double() - centre.double() @ down @ up
    return Substitute(constant.float(), down.float().contiguous(), up.float().contiguous())


def fit_gate(x: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """Return w (d,) and b (), float64, that minimise the mean of s + price · exp(-s) with s = x·w + b, plus a ridge.

    Fisher scoring: the expected Hessian is the second moment of the inputs at every w, so one factorisation serves.
    """
    centre, spread = x.double().mean(0), x.double().std(0).clamp_min(1e-9)
    z = (x.double() - centre) / spread
    second = z.T @ z / len(z) + RIDGE * torch.eye(z.shape[1]).to(z)
    factor = torch.linalg.cholesky(second)
    least = float(prices.mean().clamp_min(1e-30)) * 1e-6
    logs = prices.double().clamp_min(least).log()
    w = torch.cholesky_solve((z.T @ (logs - logs.mean()) / len(z))[:, None], factor)[:, 0]
    b = torch.logsumexp(logs - z @ w, 0) - torch.tensor(len(z)).to(z).log()

    def cost(w: Tensor, b: Tensor) -> Tensor:
        scores = z @ w + b
        return (scores + (logs - scores).exp()).mean() + 0.5 * RIDGE * w.square().sum()

    before = cost(w, b)
    for _ in range(STEPS):
        residual = 1 - (logs - z @ w - b).exp()
        step = torch.cholesky_solve((z.T @ residual / len(z) + RIDGE * w)[:, None], factor)[:, 0]
        sizes = (0.5**halvings for halvings in range(12))
        tries = ((w - size * step, b - size * residual.mean().clamp(-4, 4)) for size in sizes)
        found = next(((cost(*one), one) for one in tries if cost(*one) < before), None)
        if found is None:
            break
        gain, (after, (w, b)) = before - found[0], found
        before = after
        if gain < FLAT:
            break
    w = w / spread
    return w, b - centre @ w
