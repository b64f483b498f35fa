"""Allocate the budget to neurons, ranks and dense matrices of all layers by their effect on the complete model.

Every block offers options (`options.options_of`) with their loss in the two-sided metric, one unit for the whole
model, and a multi-choice knapsack takes the best set within the budget. LEMS and ROCKET allocate ranks in this way;
here neurons, ranks and plain matrices compete.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from pilon_compress.convert.allocate.options import Choice, options_of
from pilon_compress.convert.calibrate.sensitivity import Sensitivity
from pilon_compress.convert.plan import BankPlan, Plan, trimmed
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.convert.solve.neuron_pruning import Elimination
from pilon_compress.elastic.knapsack import Option, choose
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import track
from pilon_compress.models.families import Site


@dataclass(frozen=True)
class Sizing:
    """The sizes that a layer may get: `options` with losses times `scale`, and the order in which its neurons go."""

    layer: int
    sites: list[Site]
    options: list[Option]
    scale: float
    elimination: Elimination | None

    def left(self, neurons: int | None) -> Tensor | None:
        """Return the indices of the remaining neurons; None for all."""
        return None if neurons is None or self.elimination is None else self.elimination.left(neurons)

    def ordered(self, neurons: int | None) -> tuple[Tensor, Tensor]:
        """Return the remaining neurons, most worthy first, and the loss with so many of them left (f + 1,)."""
        assert self.elimination is not None
        order = self.elimination.order.flip(0)
        count = len(order) if neurons is None else neurons
        loss = torch.tensor([self.elimination.loss(left) for left in range(count + 1)], dtype=torch.float64)
        return order[:count], self.scale * (loss - loss[count])


@dataclass(frozen=True)
class Allocation:
    """A plan, the neurons that stay by layer (None: all), and the loss that the metric expects of every layer."""

    plan: Plan
    left: dict[int, Tensor | None]
    losses: dict[int, float]
    worth: dict[int, Tensor] = field(default_factory=dict)
    """Of an elastic conversion, by layer: the loss with so many neurons left (f + 1,), 0 with all of the plan's."""
    scales: dict[int, float] = field(default_factory=dict)
    """Of all layers: the model's measured loss over the metric's."""

    def pack(self) -> dict[str, Tensor]:
        """Return plan, losses and neurons as tensors by name, for the journal."""
        plain = {"plan": asdict(self.plan), "losses": list(self.losses.items()), "layers": list(self.left)}
        plain["scales"] = list(self.scales.items())
        text = torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)
        found = {"plain": text} | {f"left.{layer}": left for layer, left in self.left.items() if left is not None}
        return found | {f"worth.{layer}": loss for layer, loss in self.worth.items()}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> "Allocation":
        """Return the allocation that `pack` stored."""
        plain = json.loads(bytes(tensors["plain"].tolist()))
        asked = plain["plan"]
        banks = [
            BankPlan(**{**bank, "sites": tuple(Site(**site) for site in bank["sites"])}) for bank in asked["banks"]
        ]
        matrices = [Site(**site) for site in asked["matrices"]]
        host = {name: (a, b) for name, (a, b) in asked["host"].items()}
        left = {layer: tensors.get(f"left.{layer}") for layer in plain["layers"]}
        worth = {layer: tensors[f"worth.{layer}"] for layer in plain["layers"] if f"worth.{layer}" in tensors}
        plan = Plan(asked["ratio"], asked["bands"], banks, matrices, host)
        return cls(plan, left, dict(map(tuple, plain["losses"])), worth, dict(map(tuple, plain["scales"])))


def size_layers(
    dense: Dense,
    ratio: float,
    sensitivity: Sensitivity | None = None,
    neurons: bool = True,
    multiple: int | None = None,
    measured: float | None = None,
) -> list[Sizing]:
    """The options of every layer around a stored ratio, in the two-sided metric, put right by `sensitivity`.

    `neurons`: whether blocks may lose some. `multiple`: of ranks, see `Budget.rank_multiple`. `measured`: share of the
    neurons at which true losses are taken, else `ratio`.
    """
    layers = dense.layers()

    def size(layer: int) -> Sizing:
        ff = dense.read(layer)
        scale = 1.0
        if sensitivity is not None and ff.down is not None and ff.elimination is not None:
            count = max(1, round((measured or ratio) * ff.down.d_in))
            prune = partial(ff.prune, prefix=dense.source.names[layer], neurons=count)
            scale = sensitivity.measure(layer, prune, ff.elimination.loss(count))
        return Sizing(layer, ff.sites, options_of(ff, ratio, scale, neurons, multiple), scale, ff.elimination)

    # in a function, so that one layer's tensors are freed before the next one's are there
    return [size(layer) for layer in track(layers, "sizing layers")]


def allocate(
    sizings: Sequence[Sizing], ratio: float, mac_ratio: float | None = None, elastic: bool = False
) -> Allocation:
    """Spend at most `ratio` of the stored numbers, and `mac_ratio` of the MACs, at the least loss.

    `elastic`: neurons stay in falling order of worth, for later cuts. Raises BadInput if no plan is as small as that.
    """
    sites = [site for sizing in sizings for site in sizing.sites]
    dense = sum(site.parameters for site in sites)
    macs = sum(site.d_in * site.d_out for site in sites)
    menus = [sizing.options for sizing in sizings]
    chosen = choose(menus, ratio * dense, None if mac_ratio is None else mac_ratio * macs)
    if chosen is None:
        least = sum(min(option.stored for option in menu) for menu in menus) / dense
        if mac_ratio is not None and least <= ratio:
            lightest = sum(min(option.macs for option in menu) for menu in menus) / macs
            raise BadInput(
                f"ratio {ratio:g} with MACs of at most {mac_ratio:g} is too small: the smallest plan takes "
                f"{lightest:.3g} of the dense MACs; raise --mac-ratio"
            )
        raise BadInput(f"ratio {ratio:g} is too small: the smallest plan stores {least:.3g} of the dense numbers")
    plan, left = Plan(ratio, [[sizing.layer] for sizing in sizings], []), dict[int, Tensor | None]()
    worth = dict[int, Tensor]()
    for band, (sizing, option) in enumerate(zip(sizings, chosen, strict=True)):
        assert isinstance(option.what, Choice)
        left[sizing.layer] = sizing.left(option.what.neurons)
        if elastic:
            left[sizing.layer], worth[sizing.layer] = sizing.ordered(option.what.neurons)
        _plan_layer(plan, band, sizing, option.what)
    losses = {sizing.layer: option.loss for sizing, option in zip(sizings, chosen, strict=True)}
    return Allocation(plan, left, losses, worth, {sizing.layer: sizing.scale for sizing in sizings})


def _plan_layer(plan: Plan, band: int, sizing: Sizing, choice: Choice) -> None:
    for site in sizing.sites:
        small = site
        if choice.neurons is not None and sizing.elimination is not None:
            small = trimmed(site, choice.neurons, len(sizing.elimination.order))
            plan.host[site.name] = (site.d_in, site.d_out)
        rank = choice.ranks[site.name]
        if rank is None:
            plan.matrices.append(small)
        else:
            plan.banks.append(BankPlan(band, site.role, (small,), 1, rank, 1))
