"""List the options of a feed-forward block: neurons, ranks, and what each stores and loses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pilon_compress.convert.calibrate.damping import damped_cholesky
from pilon_compress.convert.calibrate.second_moments import add_gram
from pilon_compress.convert.plan import trimmed
from pilon_compress.convert.solve.eigen import eigenvalues
from pilon_compress.convert.solve.feed_forward import FeedForward
from pilon_compress.convert.solve.neuron_pruning import Elimination
from pilon_compress.elastic.knapsack import Option, pareto
from pilon_compress.models.families import Site
from pilon_compress.nn.sizing import BankSize

POWERS = (1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0)  # of the ratio: shares of the neurons that are tried
RANKS_TRIED = 48  # per projection
MULTIPLE = 8  # neurons and ranks are multiples of it where the block is large


Savings = dict[str, dict[int | None, Tensor]]  # by site name and number of neurons: see `savings_of`


@dataclass(frozen=True)
class Choice:
    """The form of a block, or of those of a band: remaining `neurons` of each (None: all), and of its projections

    ranks: by site name a rank, or None for a dense matrix   banks: by role the size of a bank that the band shares
    parts: of a band, all forms of each projection (by site name) and of each shared bank (by role)
    """

    neurons: int | None
    ranks: dict[str, int | None]
    banks: dict[str, BankSize] = field(default_factory=dict)
    parts: dict[str, list[Option]] = field(default_factory=dict, compare=False, repr=False)

    def with_parts(self, forms: Mapping[str, Any]) -> "Choice":
        """Return the same neurons and shared roles with other forms of the parts, by site name or role."""
        banks = {name: form for name, form in forms.items() if name in self.banks}
        return replace(self, ranks={name: form for name, form in forms.items() if name not in banks}, banks=banks)


def savings_of(ff: FeedForward, ratio: float, drop: bool = True) -> Savings:
    """Return what each component of each site saves, largest first, by the numbers of neurons that are tried.

    `drop`: whether neurons may go.
    """
    counts = _counts(ff, ratio) if drop else [None]
    return {site.name: _savings(ff, site, counts) for site in ff.sites}


def options_of(
    ff: FeedForward, saved: Savings, scale: float = 1.0, drop: bool = True, multiple: int | None = None
) -> list[Option]:
    """List what the block may become, smaller and smaller, with its loss in the metrics of the sites times `scale`.

    `saved`: see `savings_of`   `drop`: whether neurons may go
    `multiple`: ranks are multiples of it, of matrices that are large enough
    """
    found: list[Option] = []
    for neurons in next(iter(saved.values())):
        dropped, sites = 0.0, ff.sites
        if neurons is not None:
            assert ff.elimination is not None and ff.down is not None
            dropped = ff.elimination.loss(neurons)
            sites = [trimmed(site, neurons, ff.down.d_in) for site in ff.sites]
        pairs = zip(ff.sites, sites, strict=True)
        menus = [rank_options(saved[site.name][neurons], small, multiple) for site, small in pairs]
        fixed = sum(small.d_out for small in sites if small.bias)
        highest = max(item.loss for menu in menus for item in menu) or 1.0
        for price in torch.logspace(-14, 1, 60, base=10).tolist():  # loss per number: the convex hull of all sums
            picks = [min(menu, key=lambda one, p=price: one.loss + p * highest * one.stored) for menu in menus]  # type: ignore[misc]
            ranks = {site.name: pick.what for site, pick in zip(ff.sites, picks, strict=True)}
            found.append(
                Option(
                    scale * (dropped + sum(pick.loss for pick in picks)),
                    fixed + sum(pick.stored for pick in picks),
                    sum(pick.macs for pick in picks),
                    Choice(neurons, ranks),  # type: ignore[arg-type]
                )
            )
    return pareto(found + (_pruned(ff, scale) if drop else []))


def _pruned(ff: FeedForward, scale: float) -> list[Option]:
    """Plain matrices of every number of neurons: one elimination has the loss of all, so the budget is met closely."""
    if ff.down is None or ff.elimination is None:
        return []
    step = neuron_step(ff.down.d_in)
    counts, elimination = range(step, ff.down.d_in, step), ff.elimination
    return [whole_block(ff.sites, ff.down.d_in, elimination, scale, count) for count in counts]


def whole_block(sites: Sequence[Site], width: int, elimination: Elimination, scale: float, neurons: int) -> Option:
    """Return the block with `neurons` of its `width` left, and every matrix whole."""
    left, loss = None if neurons == width else neurons, 0.0
    if left is not None:
        sites, loss = [trimmed(site, left, width) for site in sites], scale * elimination.loss(left)
    stored, macs = sum(site.parameters for site in sites), sum(site.d_in * site.d_out for site in sites)
    return Option(loss, stored, macs, Choice(left, {site.name: None for site in sites}))


def neuron_step(full: int) -> int:
    """Return the multiple of neurons that is tried in blocks of `full`."""
    return MULTIPLE if full >= 32 * MULTIPLE else 1


def _savings(ff: FeedForward, site: Site, counts: Sequence[int | None]) -> dict[int | None, Tensor]:
    """Return what each component of the site saves, largest first, by number of neurons: `Target.savings` of each.

    Neurons that stay are a prefix of one order, so every count's matrix grows out of the last one's, and one
    Cholesky factor of all neurons' moments holds those of every count: about the cost of the largest count alone.
    """
    if ff.down is None or ff.elimination is None or counts == [None]:
        return {count: ff.target(site, None).savings for count in counts}
    order, width = ff.elimination.order.flip(0), ff.down.d_in
    wide = {count: count or width for count in counts}
    grow = _grow_down(ff, order) if site == ff.down else _grow_up(ff, site, order)
    found: dict[int | None, Tensor] = {}
    for count, size in sorted(wide.items(), key=lambda item: item[1]):
        small = trimmed(site, size, width)
        values = eigenvalues(grow(size)).flip(0).clamp_min(0)
        found[count] = values[: min(small.d_in, small.d_out)]
    return found


def _grow_up(ff: FeedForward, site: Site, order: Tensor) -> Callable[[int], Tensor]:
    """X G Xᵀ (d_in, d_in), X = R W, of the first `size` neurons in `order`, for growing sizes."""
    assert ff.down is not None
    columns = ff.columns(site, order).reshape(-1, len(order)).T.flatten()  # a neuron's columns side by side
    each = len(columns) // len(order)
    X = ff.metric_root(site)[0] @ ff.weights[site.name][:, columns]
    G = ff.gradients[site.name][columns[:, None], columns]
    square, done = X.new_zeros(len(X), len(X)), 0

    def grow(size: int) -> Tensor:
        nonlocal done
        old, new = slice(0, done), slice(done, size * each)
        half = (X[:, old] @ G[old, new] + 0.5 * (X[:, new] @ G[new, new])) @ X[:, new].T
        square.add_(half).add_(half.T)
        done = size * each
        return square

    return grow


def _grow_down(ff: FeedForward, order: Tensor) -> Callable[[int], Tensor]:
    """S Zᵀ Z Sᵀ (d_out, d_out), G = Sᵀ S: Zᵀ Z is Wᵀ C W of the first neurons, refitted. C = L Lᵀ, Z = L⁻¹ C W."""
    assert ff.down is not None
    name = ff.down.name
    metric, root = ff.metrics[name], ff.gradient_root(ff.down)[0]
    lower = damped_cholesky(metric[order[:, None], order], name)
    Z = torch.linalg.solve_triangular(lower, (metric @ ff.weights[name])[order], upper=False) @ root.T
    square, done = torch.zeros_like(root), 0

    def grow(size: int) -> Tensor:
        nonlocal done
        add_gram(square, Z[done:size])
        done = size
        return square

    return grow


def _counts(ff: FeedForward, ratio: float) -> list[int | None]:
    if ff.down is None:
        return [None]
    full = ff.down.d_in
    step = neuron_step(full)
    counts = {max(step, round(full * ratio**power / step) * step) for power in POWERS}
    return [None, *(count for count in sorted(counts) if count < full)]


def rank_options(saved: Tensor, site: Site, multiple: int | None = None) -> list[Option]:
    """Return a dense matrix and smaller pairs of factors as options; these also store compositions, so rank + 1."""
    full = site.d_in * site.d_out
    tail = torch.cat([saved.flip(0).cumsum(0).flip(0), saved.new_zeros(1)])
    price = site.d_in + site.d_out
    largest = (full - 2) // (price + 1)
    step = max(1, largest // RANKS_TRIED)
    if multiple is not None and largest >= multiple:
        step = multiple * max(1, round(step / multiple))
    elif largest >= 8 * MULTIPLE:
        step = max(step, MULTIPLE * round(step / MULTIPLE))
    ranks = range(step, largest + 1, step)
    return [Option(0.0, full, full, None)] + [Option(float(tail[r]), r * price + r + 1, r * price, r) for r in ranks]
