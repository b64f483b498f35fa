"""The feed-forward block of one layer as conversion sizes it: which neurons stay, and each projection's rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pilon_compress.convert.allocate.knapsack import Option, pareto
from pilon_compress.convert.calibrate.damping import damped_cholesky
from pilon_compress.convert.calibrate.second_moments import Moments, add_gram
from pilon_compress.convert.plan import down_of, trimmed
from pilon_compress.convert.solve.eigen import eigenvalues
from pilon_compress.convert.solve.low_rank import Target, damped, factor
from pilon_compress.convert.solve.neuron_pruning import Elimination, eliminate, refit
from pilon_compress.models.families import Site

POWERS = (1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0)  # of the ratio: shares of the neurons that are tried
RANK_STEPS = 48  # ranks tried per projection
ROUND = 8  # neurons and ranks are multiples of it where the block is large


@dataclass(frozen=True)
class Choice:
    """How a block is stored: `neurons` that stay (None: all), and by site name a rank, or None for one matrix."""

    neurons: int | None
    ranks: dict[str, int | None]


class Block:
    """The sites of one layer with their dense weights and metrics, in float64.

    It is `whole` where neurons can be dropped: up (and gate, or both fused) that feed one down.
    """

    def __init__(self, layer: int, sites: Sequence[Site], module: nn.Module, prefix: str, moments: Moments) -> None:
        self.layer, self.sites = layer, list(sites)
        self.down = down_of(sites)
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._roots: dict[str, tuple[Tensor, Tensor]] = {}
        moved: dict[str, Tensor] = {}  # gate and up share one metric
        for site in sites:
            linear = module.get_submodule(site.name.removeprefix(f"{prefix}."))
            self.weights[site.name] = dense_weight(linear)
            if site.bias:
                self.biases[site.name] = linear.get_parameter("bias").detach().double()
            moment = moments.input(site)
            key = f"{site.input} {site.bias}"
            if key not in moved:
                moved[key] = damped(moment.covariance() if site.bias else moment.second_moment())
            self.metrics[site.name] = moved[key]
            self.means[site.name] = moment.mean.double()
            self.gradients[site.name] = damped(moments.gradient(site))

    @cached_property
    def elimination(self) -> Elimination | None:
        """The order in which neurons go; None where the block is not whole."""
        if self.down is None:
            return None
        name = self.down.name
        return eliminate(self.weights[name], self.metrics[name], self.gradients[name])

    def columns(self, site: Site, left: Tensor) -> Tensor:
        """Outputs of an up-like site that belong to the neurons `left`; a fused gate_up has two for each."""
        assert self.down is not None
        halves = torch.arange(site.d_out // self.down.d_in, device=left.device)[:, None] * self.down.d_in
        return (halves + left).flatten()

    def target(self, site: Site, left: Tensor | None) -> Target:
        """The site's problem in the dense model's own stream, with the neurons `left`."""
        name = site.name
        weight, metric, gradient = self.weights[name], self.metrics[name], self.gradients[name]
        if left is not None and site == self.down:
            weight, metric = refit(weight, metric, left), metric[left][:, left]
        elif left is not None:
            columns = self.columns(site, left)
            weight, gradient = weight[:, columns], gradient[columns][:, columns]
        down, wide = site == self.down, weight.shape[0] <= weight.shape[1]
        whole_metric, whole_gradient = left is None or not down, left is None or down
        return Target(
            *(name, site.layer, weight, metric, gradient),
            metric_root=self._root(self.metrics[name], f"{site.input} {site.bias}") if wide and whole_metric else None,
            gradient_root=self._root(self.gradients[name], name) if not wide and whole_gradient else None,
        )

    def _root(self, metric: Tensor, key: str) -> tuple[Tensor, Tensor]:
        """The factor of a metric that no choice of neurons changes, taken once."""
        if key not in self._roots:
            self._roots[key] = factor(metric)
        return self._roots[key]

    def options(self, ratio: float, scale: float = 1.0, drop: bool = True) -> list[Option]:
        """What the block may become, smaller and smaller, with its loss in the metrics of the sites times `scale`.

        `drop`: whether neurons may go.
        """
        found: list[Option] = []
        counts = self._counts(ratio) if drop else [None]
        saved = {site.name: self._savings(site, counts) for site in self.sites}
        for neurons in counts:
            dropped, sites = 0.0, self.sites
            if neurons is not None:
                assert self.elimination is not None and self.down is not None
                dropped = self.elimination.loss(neurons)
                sites = [trimmed(site, neurons, self.down.d_in) for site in self.sites]
            menus = [_ranks(saved[site.name][neurons], small) for site, small in zip(self.sites, sites, strict=True)]
            fixed = sum(small.d_out for small in sites if small.bias)
            highest = max(item.loss for menu in menus for item in menu) or 1.0
            for price in torch.logspace(-14, 1, 60, base=10).tolist():  # loss per number: the convex hull of all sums
                picks = [min(menu, key=lambda one, p=price: one.loss + p * highest * one.stored) for menu in menus]  # type: ignore[misc]
                ranks = {site.name: pick.what for site, pick in zip(self.sites, picks, strict=True)}
                found.append(
                    Option(
                        scale * (dropped + sum(pick.loss for pick in picks)),
                        fixed + sum(pick.stored for pick in picks),
                        sum(pick.macs for pick in picks),
                        Choice(neurons, ranks),  # type: ignore[arg-type]
                    )
                )
        return pareto(found)

    def _savings(self, site: Site, counts: Sequence[int | None]) -> dict[int | None, Tensor]:
        """What each component of the site saves, largest first, by how many neurons stay: `Target.savings` of each.

        Neurons that stay are a prefix of one order, so every count's matrix grows out of the last one's, and one
        Cholesky factor of all neurons' moments holds those of every count: about the cost of the largest count alone.
        """
        if self.down is None or self.elimination is None or counts == [None]:
            return {count: self.target(site, None).savings for count in counts}
        order, width = self.elimination.order.flip(0), self.down.d_in
        wide = {count: count or width for count in counts}
        grow = self._grow_down(order) if site == self.down else self._grow_up(site, order)
        found: dict[int | None, Tensor] = {}
        for count, size in sorted(wide.items(), key=lambda item: item[1]):
            small = trimmed(site, size, width)
            values = eigenvalues(grow(size)).flip(0).clamp_min(0)
            found[count] = values[: min(small.d_in, small.d_out)]
        return found

    def _grow_up(self, site: Site, order: Tensor) -> Callable[[int], Tensor]:
        """X G Xᵀ (d_in, d_in), X = R W, of the first `size` neurons in `order`, for growing sizes."""
        assert self.down is not None
        columns = self.columns(site, order).reshape(-1, len(order)).T.flatten()  # a neuron's columns side by side
        each = len(columns) // len(order)
        X = self._root(self.metrics[site.name], f"{site.input} {site.bias}")[0] @ self.weights[site.name][:, columns]
        G = self.gradients[site.name][columns[:, None], columns]
        square, done = X.new_zeros(len(X), len(X)), 0

        def grow(size: int) -> Tensor:
            nonlocal done
            old, new = slice(0, done), slice(done, size * each)
            half = (X[:, old] @ G[old, new] + 0.5 * (X[:, new] @ G[new, new])) @ X[:, new].T
            square.add_(half).add_(half.T)
            done = size * each
            return square

        return grow

    def _grow_down(self, order: Tensor) -> Callable[[int], Tensor]:
        """S Zᵀ Z Sᵀ (d_out, d_out), G = Sᵀ S: Zᵀ Z is Wᵀ C W of the first neurons, refitted. C = L Lᵀ, Z = L⁻¹ C W."""
        assert self.down is not None
        name = self.down.name
        metric, root = self.metrics[name], self._root(self.gradients[name], name)[0]
        lower = damped_cholesky(metric[order[:, None], order], name)
        Z = torch.linalg.solve_triangular(lower, (metric @ self.weights[name])[order], upper=False) @ root.T
        square, done = torch.zeros_like(root), 0

        def grow(size: int) -> Tensor:
            nonlocal done
            add_gram(square, Z[done:size])
            done = size
            return square

        return grow

    def _counts(self, ratio: float) -> list[int | None]:
        if self.down is None:
            return [None]
        full = self.down.d_in
        step = ROUND if full >= 32 * ROUND else 1
        counts = {max(step, round(full * ratio**power / step) * step) for power in POWERS}
        return [None, *(count for count in sorted(counts) if count < full)]


def _ranks(saved: Tensor, site: Site) -> list[Option]:
    """One matrix, or two factors of some rank where they are smaller, which also store their composition: rank + 1."""
    full = site.d_in * site.d_out
    tail = torch.cat([saved.flip(0).cumsum(0).flip(0), saved.new_zeros(1)])
    price = site.d_in + site.d_out
    largest = (full - 2) // (price + 1)
    step = max(1, largest // RANK_STEPS)
    step = max(step, ROUND * round(step / ROUND)) if largest >= 8 * ROUND else step
    ranks = range(step, largest + 1, step)
    return [Option(0.0, full, full, None)] + [Option(float(tail[r]), r * price + r + 1, r * price, r) for r in ranks]


def dense_weight(linear: nn.Module) -> Tensor:
    """(d_in, d_out) float64, whichever way round the host stores it."""
    weight = linear.get_parameter("weight").detach().double()
    return weight if type(linear).__name__ == "Conv1D" else weight.T
