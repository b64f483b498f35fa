"""Fit banks of whole neurons jointly, behind the converted layers before their band.

    columns     what a group of neurons reads: the weighted mean of its members in the band's metric
    scale, bias of each layer before the activation: least squares on the dense neuron's own pre-activation
    rows D, and scales s' of each layer behind it, in the moments C of the activations ĥ that follow:

    minimise  Σ_l γ_l E ‖t_l - ĥ_l S'_l D_l‖²    by turns    (Σ γ S' C S') D = Σ γ S' X     X = E[ĥ tᵀ]
                                                             (C ∘ D G Dᵀ) s' = diag(X G Dᵀ)

Neurons that one layer uses alone answer every change of the scales s' at once: these are solved in what they leave.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pilon_compress.convert.neurons.matching import BandMetric, Neurons, between
from pilon_compress.convert.plan import NeuronBankPlan, Plan
from pilon_compress.convert.solve.feed_forward import Dense, FeedForward
from pilon_compress.convert.solve.neuron_fit import LayerStart, NeuronFit
from pilon_compress.convert.solve.neuron_layer import (
    behind_gate,
    dense_columns,
    fit_scales,
    least_squares,
    output_moments,
    solve_input,
)
from pilon_compress.convert.solve.neuron_pruning import refit
from pilon_compress.convert.solve.sequential_targets import BlockPair
from pilon_compress.data.batch import Batch
from pilon_compress.io.journal import Journal
from pilon_compress.models.hidden_states import Stream

SWEEPS = 8  # of rows and scales: later ones change the loss by less than a thousandth


class _Member(NamedTuple):
    """A layer's neurons (k,), and moments of their activations.

    start: its place in the bank   rows (k, d_out): dense, for the bank's columns   worth (k,)
    gradient (d_out, d_out): G, times the layer's scale   moment (k, k): C
    cross (k, d_out): X, both centred where `down` has a bias
    """

    start: LayerStart
    rows: Tensor
    worth: Tensor
    gradient: Tensor
    moment: Tensor
    cross: Tensor


@dataclass(frozen=True)
class NeuronFitter:
    """Fits the banks of neurons of `plan`, one after the other.

    left: the dense neurons that stay, in the order of `slots`, their places in the bank   scales: of layers' losses
    batches: the text
    """

    dense: Dense
    plan: Plan
    left: Mapping[int, Tensor | None]
    slots: Mapping[int, Tensor]
    scales: Mapping[int, float]
    batches: Sequence[Batch]
    journal: Journal

    def __call__(self, name: str, theirs: Stream | None, ours: Stream | None) -> NeuronFit:
        """Fit a bank behind the converted layers before its band; without streams in the dense model's own.

        theirs, ours: streams of the dense and of the converted model that stand before the band, and stay there
        """
        key = f"neurons.{name}"
        known: NeuronFit | None = self.journal.get(key, NeuronFit.unpack)
        if known is not None:
            return known
        store = next(one for one in self.plan.neuron_banks if one.name == name)
        left = {layer: tensor for layer in store.layers if (tensor := self.left[layer]) is not None}
        fit, neurons = _columns(self.dense, store, left, self.slots, self.scales)
        if theirs is None or ours is None:
            theirs, ours = Stream(self.dense.source, self.batches), None
        else:
            theirs, ours = theirs.fork(), ours.fork()
        members = dict[int, _Member]()
        for layer in range(theirs.position, max(store.layers) + 1):
            with self.dense.source.block(layer) as module:
                if layer not in left:
                    for stream in (theirs, ours):
                        if stream is not None:
                            stream.advance(module)
                    continue
                names = self.dense.source.names
                ff = FeedForward.of(module, names[layer], layer, self.dense.layers()[layer], self.dense.moments)
                block = _Block(ff, module, left[layer], fit, f"{names[layer]}.")
                members[layer] = block.measured(neurons[layer], theirs, ours, self.scales.get(layer, 1.0))
        fit = _joint(fit, members)
        self.journal.put(key, fit.pack())
        return fit


def _columns(
    dense: Dense,
    store: NeuronBankPlan,
    left: Mapping[int, Tensor],
    slots: Mapping[int, Tensor],
    scales: Mapping[int, float],
) -> tuple[NeuronFit, dict[int, Neurons]]:
    """Return the bank with its columns, without rows yet, and the layers' neurons in the band's metric."""
    blocks = {layer: dense.read(layer) for layer in store.layers}
    metric = BandMetric.of(list(blocks.values()))
    neurons = {layer: metric.neurons(ff, left[layer], scales.get(layer, 1.0)) for layer, ff in blocks.items()}
    merged, users = _merged(store, neurons, slots)
    columns, sizes, best = dict[str, Tensor](), dict[str, Tensor](), torch.zeros_like(merged.worth)
    for layer, ff in blocks.items():
        places, worth = slots[layer], neurons[layer].worth
        better = worth >= best[places]
        best[places] = torch.maximum(best[places], worth)
        for source, weight in dense_columns(ff, left[layer]).items():
            bank = columns.setdefault(source, weight.new_zeros(len(weight), store.neurons))
            size = sizes.setdefault(source, torch.zeros_like(best))
            bank[:, places] = weight
            size[places] = torch.where(better, (metric.inputs @ weight).norm(dim=0), size[places])
    shared = users > 1
    for source, size in sizes.items():  # as long as the worthiest member's, whose scale is then near 1
        scaled = (merged.sides[source][shared] * size[shared, None]).T
        columns[source][:, shared] = torch.linalg.solve_triangular(metric.inputs, scaled, upper=True)
    starts = {}
    for layer, places in slots.items():
        if layer in blocks:
            ones = torch.ones(len(places), dtype=torch.float64)
            starts[layer] = LayerStart(places, ~shared[places], ones, ones, ones, ones.new_empty(0))
    return NeuronFit(columns, best.new_empty(0), starts), neurons


def _merged(
    store: NeuronBankPlan, neurons: Mapping[int, Neurons], slots: Mapping[int, Tensor]
) -> tuple[Neurons, Tensor]:
    """Return the bank's neurons as unit vectors, those of several layers between theirs, and their numbers of users."""
    users, state = torch.zeros(store.neurons, dtype=torch.long), None
    for layer in store.layers:
        here = torch.zeros(store.neurons, dtype=torch.bool).index_fill(0, slots[layer], True)
        mine = _spread(neurons[layer], slots[layer], store.neurons)
        if state is None:
            state = mine
        else:
            state = _chosen(_chosen(state, mine, here & (users == 0)), between(state, mine), here & (users > 0))
        users += here
    assert state is not None
    return state, users


def _spread(neurons: Neurons, places: Tensor, count: int) -> Neurons:
    """Return the neurons at their `places` of a bank of `count`; others are zero, and worth nothing."""
    sides = {
        name: side.new_zeros(count, side.shape[1]).index_copy(0, places, side) for name, side in neurons.sides.items()
    }
    return Neurons(sides, neurons.worth.new_zeros(count).index_copy(0, places, neurons.worth))


def _chosen(a: Neurons, b: Neurons, second: Tensor) -> Neurons:
    """Return neurons of `b` where `second` (N,) is True, else of `a`."""
    sides = {name: torch.where(second[:, None], b.sides[name], side) for name, side in a.sides.items()}
    return Neurons(sides, torch.where(second, b.worth, a.worth))


@dataclass(frozen=True)
class _Block:
    """A dense block `module` whose neurons `left` become those of a bank; `prefix`: its name, and a dot."""

    ff: FeedForward
    module: nn.Module
    left: Tensor
    fit: NeuronFit
    prefix: str

    def measured(self, neurons: Neurons, theirs: Stream, ours: Stream | None, scale: float) -> _Member:
        """Run the block with the bank's columns in the place of its own; both streams move behind it.

        In the converted stream rows of its own then stand in for the bank's, which are not known yet.
        """
        down = self.ff.down
        assert down is not None
        pair = BlockPair(self.module, copy.deepcopy(self.module), theirs, theirs.fork() if ours is None else ours)
        ups = [site for site in self.ff.sites if site != down]
        read = [] if ours is None else list(dict.fromkeys(self._local(site.input) for site in ups))
        crosses = pair.inputs(read, self._local(down.name))
        for site in ups:
            part, bias = solve_input(self.ff, site, self.left, self.fit, crosses.get(self._local(site.input)))
            pair.replace(self._local(site.name), self.fit.approximation(site, part), bias)
        rows = refit(self.ff.weights[down.name], self.ff.metrics[down.name], self.left)
        rows = behind_gate(self.ff, self.left, self.fit)[:, None] * rows
        pair.replace(self._local(down.name), rows, rows.new_zeros(down.d_out) if down.bias else None)
        cross = pair.output(self._local(down.name))
        moment, other = output_moments(cross, down.bias)
        if ours is None:
            theirs.position += 1
        else:
            alone = least_squares(moment, other, rows)
            pair.replace(self._local(down.name), alone, cross.bias(alone) if down.bias else None)
            pair.finish()
        start = self.fit.starts[self.ff.layer]
        start = start._replace(mean=cross.inputs.mean.double(), target=cross.mean.double())
        return _Member(start, rows, neurons.worth, scale * self.ff.gradients[down.name], moment, other)

    def _local(self, name: str) -> str:
        return name.removeprefix(self.prefix)


def _joint(fit: NeuronFit, members: Mapping[int, _Member]) -> NeuronFit:
    """Fit rows and scales by turns; the members' relative weights are the means of their gradients' moments."""
    count = next(iter(fit.columns.values())).shape[1]
    weights = {layer: float(one.gradient.diagonal().mean()) for layer, one in members.items()}
    total = sum(weights.values()) or 1.0
    gradient = sum((one.gradient for one in members.values()), torch.zeros(())) / total
    first = rows = _worthiest(members, count)
    members = {layer: _started(one, rows, gradient) for layer, one in members.items()}
    scales = _scales(members, rows, gradient)
    for _ in range(SWEEPS):
        rows = _rows(members, scales, {layer: weight / total for layer, weight in weights.items()}, first)
        scales = _scales(members, rows, gradient)
    starts = {}
    for layer, one in members.items():
        size = rows[one.start.slots].square().sum(1) * scales[layer].square()
        power = size * one.moment.diagonal()
        starts[layer] = one.start._replace(scale=scales[layer], power=power)
    return NeuronFit(fit.columns, rows, starts)


def _worthiest(members: Mapping[int, _Member], count: int) -> Tensor:
    """Return the row (N, d_out) that every neuron has in the layer where it is worth most."""
    rows, best = torch.zeros(0), torch.full((count,), -1.0, dtype=torch.float64)
    for one in members.values():
        slots = one.start.slots
        rows = rows if len(rows) else one.rows.new_zeros(count, one.rows.shape[1])
        better = one.worth > best[slots]
        rows[slots[better]], best[slots[better]] = one.rows[better], one.worth[better]
    return rows


def _started(one: _Member, rows: Tensor, gradient: Tensor) -> _Member:
    """Return the layer's neurons with the scales that bring the bank's `rows` nearest to their own."""
    bank = rows[one.start.slots]
    weighed = bank @ gradient
    scale = (weighed * one.rows).sum(1) / (weighed * bank).sum(1).clamp_min(1e-30)
    return one._replace(start=one.start._replace(scale=torch.where(one.start.own, torch.ones_like(scale), scale)))


def _scales(members: Mapping[int, _Member], rows: Tensor, gradient: Tensor) -> dict[int, Tensor]:
    return {
        layer: fit_scales(one.moment, one.cross, rows[one.start.slots], one.start, gradient)
        for layer, one in members.items()
    }


def _rows(
    members: Mapping[int, _Member], scales: Mapping[int, Tensor], weights: Mapping[int, float], prior: Tensor
) -> Tensor:
    """Return the rows (N, d_out) for the scales, by least squares; directions that are not seen keep `prior`'s."""
    normal, right = prior.new_zeros(len(prior), len(prior)), torch.zeros_like(prior)
    for layer, one in members.items():
        slots, scale, weight = one.start.slots, scales[layer], weights[layer]
        normal[slots[:, None], slots] += weight * scale[:, None] * one.moment * scale
        right.index_add_(0, slots, weight * scale[:, None] * one.cross)
    return least_squares(normal, right, prior)
