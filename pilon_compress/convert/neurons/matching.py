"""Match neurons of a band's layers: which of them one neuron of a bank can stand for.

A neuron is a rank-one function: what it reads (a direction before the activation, two in a gated block), and the row
that it writes. In metrics that the band has in common, both are unit vectors u; replacing neurons of worth x and y,
whose cosines multiply to c, by the best one between them costs

    x + y - λ,   λ = (x + y) / 2 + √((x - y)² / 4 + x y c²)      the larger eigenvalue of x u uᵀ + y v vᵀ

which is what dropping the lesser one costs where c = 0. A neuron's worth is its loss when it alone goes and the others
make up for it (`solve.neuron_pruning`). Hungarian matching finds the pairs of least total cost; a band of three layers
matches the third with the pairs of the first two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pilon_compress.convert.calibrate.damping import damped_cholesky, damped_inverse
from pilon_compress.convert.solve.feed_forward import FeedForward
from pilon_compress.convert.solve.neuron_layer import dense_columns
from pilon_compress.convert.solve.neuron_pruning import refit
from pilon_compress.models.families import Site

Group = dict[int, int]  # layer -> place of its neuron, among those that are left there


@dataclass(frozen=True)
class Neurons:
    """Neurons of one layer, or groups of neurons, in a band's metrics.

    sides: unit vectors (k, d) by side: `gate` and `up`, or `up` alone, and `down`; the first decides the activation
    size (k,): norm of what the first side reads   worth (k,)
    """

    sides: dict[str, Tensor]
    worth: Tensor

    def __len__(self) -> int:
        return len(self.worth)

    def taken(self, places: Tensor) -> "Neurons":
        """Return the neurons at these places."""
        return Neurons({name: side[places] for name, side in self.sides.items()}, self.worth[places])

    def joined(self, other: "Neurons") -> "Neurons":
        """Return these neurons and then the others."""
        sides = {name: torch.cat([side, other.sides[name]]) for name, side in self.sides.items()}
        return Neurons(sides, torch.cat([self.worth, other.worth]))


@dataclass(frozen=True)
class BandMetric:
    """Roots R, Rᵀ R a mean of the layers' metrics, of a band's inputs and of its outputs' gradients."""

    inputs: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, blocks: Sequence[FeedForward]) -> "BandMetric":
        """Average the metrics of the layers, each in its own unit."""
        ups = [ff.metrics[_ups(ff)[0].name] for ff in blocks]
        downs = [ff.gradients[ff.down.name] for ff in blocks if ff.down is not None]
        inputs, outputs = (sum(one / one.diagonal().mean() for one in found) for found in (ups, downs))
        assert isinstance(inputs, Tensor) and isinstance(outputs, Tensor)
        return cls(damped_cholesky(inputs, upper=True), damped_cholesky(outputs, upper=True))

    def neurons(self, ff: FeedForward, left: Tensor, scale: float) -> Neurons:
        """Describe the neurons `left` of a layer whose losses count `scale` times."""
        assert ff.down is not None
        name = ff.down.name
        metric = ff.metrics[name][left][:, left]
        rows = refit(ff.weights[name], ff.metrics[name], left)
        power = ((rows @ ff.gradients[name]) * rows).sum(1)
        worth = scale * power / damped_inverse(metric, name).diagonal()
        sides = {source: (self.inputs @ weight).T for source, weight in dense_columns(ff, left).items()}
        sides["down"] = rows @ self.outputs.T
        return Neurons({name: _unit(side) for name, side in sides.items()}, worth.clamp_min(0))


def _ups(ff: FeedForward) -> list[Site]:
    return [site for site in ff.sites if site != ff.down]


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def cosines(a: Neurons, b: Neurons) -> Tensor:
    """Return the product of the cosines of all sides (k_a, k_b), from 0 to 1.

    A scale behind the activation can turn a sign; before it a neuron that reads the opposite is another function.
    """
    first, *others = [side @ b.sides[name].T for name, side in a.sides.items()]
    found = first.clamp_min(0)
    for cosine in others:
        found *= cosine.abs()
    return found.clamp_max(1)


def costs(a: Neurons, b: Neurons) -> Tensor:
    """Return the cost (k_a, k_b) of one neuron in the place of each pair."""
    x, y = a.worth[:, None], b.worth[None]
    return (x + y) / 2 - ((x - y).square() / 4 + x * y * cosines(a, b).square()).sqrt()


def match(a: Neurons, b: Neurons) -> tuple[Tensor, Tensor, Tensor]:
    """Match as many neurons as the smaller set has, at the least total cost; (places in a, places in b, costs)."""
    from scipy.optimize import linear_sum_assignment  # here: it takes half a second

    cost = costs(a, b)
    first, second = (torch.as_tensor(places) for places in linear_sum_assignment(cost.cpu().numpy()))
    return first, second, cost[first, second]


def between(a: Neurons, b: Neurons) -> Neurons:
    """Return the neuron between each pair: per side the weighted mean, and what it is worth."""
    x, y = a.worth[:, None], b.worth[:, None]
    sides, product = dict[str, Tensor](), torch.ones_like(a.worth)
    for place, (name, u) in enumerate(a.sides.items()):
        v = b.sides[name]
        cosine = (u * v).sum(1, keepdim=True)
        if place:
            v = torch.where(cosine < 0, -v, v)
        cosine = cosine.abs() if place else cosine.clamp_min(0)
        largest = _larger(x, y, cosine)
        ours, theirs = (x >= y).to(u), (x < y).to(u)
        mixed = (largest - y + 1e-30) * ours + x * cosine * theirs, y * cosine * ours + (largest - x + 1e-30) * theirs
        sides[name] = _unit(mixed[0] * u + mixed[1] * v)
        product = product * cosine[:, 0]
    return Neurons(sides, _larger(a.worth, b.worth, product))


def _larger(x: Tensor, y: Tensor, cosine: Tensor) -> Tensor:
    return (x + y) / 2 + ((x - y).square() / 4 + x * y * cosine.square()).sqrt()


@dataclass
class _State:
    """The neurons of a band so far, with the layers' neurons that each stands for."""

    neurons: Neurons
    groups: list[Group]


def share(bands: Sequence[dict[int, Neurons]], wanted: int) -> list[list[Group]] | None:
    """Group neurons of every band, given by layer, so that the banks have `wanted` neurons fewer than their layers.

    The cheapest pairs of all bands are joined first. Returns groups per band, those of most layers first; None where
    the bands are too short for that.
    """
    members = [list(band.items()) for band in bands]
    states = [_State(neurons, [{layer: place} for place in range(len(neurons))]) for (layer, neurons), *_ in members]
    steps, done = max(map(len, members)) - 1, 0
    for step in range(1, steps + 1):
        later = sum(len(neurons) for band in members for _, neurons in band[step + 1 :])
        now = max(round(wanted * step / steps), wanted - later) - done
        matched = {
            index: match(states[index].neurons, band[step][1]) for index, band in enumerate(members) if len(band) > step
        }
        ranked = sorted(
            (step > 1 or place != int(found.argmin()), float(cost), index, place)  # one in every band at least
            for index, (_, _, found) in matched.items()
            for place, cost in enumerate(found)
        )[:now]
        done += len(ranked)
        for index, (first, second, _) in matched.items():
            places = torch.tensor([place for *_, band, place in ranked if band == index], dtype=torch.long)
            _join(states[index], *members[index][step], first[places], second[places])
    if done < wanted:
        return None
    return [sorted(state.groups, key=lambda group: (-len(group), sorted(group), *group.values())) for state in states]


def _join(state: _State, layer: int, neurons: Neurons, first: Tensor, second: Tensor) -> None:
    """Add a layer's neurons to a band's: those at `second` to the groups at `first`, the others as they are."""
    free = torch.ones(len(neurons), dtype=torch.bool).index_fill(0, second, False).nonzero()[:, 0]
    rest = torch.ones(len(state.groups), dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
    both = between(state.neurons.taken(first), neurons.taken(second))
    state.neurons = both.joined(state.neurons.taken(rest)).joined(neurons.taken(free))
    groups = [{**state.groups[a], layer: b} for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    state.groups = groups + [state.groups[a] for a in rest.tolist()] + [{layer: b} for b in free.tolist()]
