"""Allocate the budget to neurons, ranks and dense matrices of all layers by their effect on the complete model.

Every block offers options (`options.options_of`) with their loss in the two-sided metric, one unit for the whole
model, and a multi-choice knapsack takes the best set within the budget. LEMS and ROCKET allocate ranks in this way;
here neurons, ranks and plain matrices compete.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from pilon_compress.convert.allocate.band_parts import part_by_part, without
from pilon_compress.convert.allocate.options import Choice, Savings, options_of, savings_of
from pilon_compress.convert.calibrate.sensitivity import Change, Sensitivity
from pilon_compress.convert.plan import BankPlan, NeuronBankPlan, Plan, trimmed
from pilon_compress.convert.solve.feed_forward import Dense, FeedForward
from pilon_compress.convert.solve.layer import uniform_rank
from pilon_compress.convert.solve.neuron_pruning import Elimination
from pilon_compress.elastic.knapsack import Limits, Menu, Option, Pick, choose_menus
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import track
from pilon_compress.models.families import Site
from pilon_compress.nn.targets import Target

TOLERANCE = 0.01  # of a ratio that is to be spent
SLACK, COARSE = 0.9, 20  # times the tolerance: what may stay unspent, and at first, since options of bands lie coarsely
TRIES = 12  # sets of neurons, if the parts of bands cannot spend both ratios


class CannotSpend(BadInput):
    """A ratio of MACs that is to be spent, and cannot be."""


@dataclass(frozen=True)
class Sizing:
    """The sizes that a block of a layer may get: `options` with losses times `scale`, and the order of its neurons."""

    layer: int
    sites: list[Site]
    options: list[Option]
    scale: float
    elimination: Elimination | None
    savings: Savings = field(default_factory=dict)

    @property
    def kind(self) -> Target:
        """Return the kind of block: ffn, attention or other."""
        return self.sites[0].target

    @property
    def counts(self) -> list[int | None]:
        """Return the numbers of neurons that are tried beside factors."""
        return list(next(iter(self.savings.values()), {}))

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
    """Loss by layer with so many neurons left (f + 1,), 0 with all of the plan's: of elastic conversions."""
    scales: dict[int, float] = field(default_factory=dict)
    """Measured loss of the model over the metric's, by layer."""
    slots: dict[int, Tensor] = field(default_factory=dict)
    """Neurons of its bank that a layer uses (k,), ascending; `left` has the dense ones in this order."""

    def pack(self) -> dict[str, Tensor]:
        """Return plan, losses and neurons as tensors by name, for the journal."""
        plain = {"plan": asdict(self.plan), "losses": list(self.losses.items()), "layers": list(self.left)}
        plain["scales"] = list(self.scales.items())
        text = torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)
        found = {"plain": text} | {f"left.{layer}": left for layer, left in self.left.items() if left is not None}
        found |= {f"slots.{layer}": slots for layer, slots in self.slots.items()}
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
        stores = [
            NeuronBankPlan(
                store["band"], tuple(Site(**s) for s in store["sites"]), store["neurons"], tuple(store["top_k"])
            )
            for store in asked["neuron_banks"]
        ]
        slots = {layer: tensors[f"slots.{layer}"] for layer in plain["layers"] if f"slots.{layer}" in tensors}
        plan = Plan(asked["ratio"], asked["bands"], banks, matrices, host, stores)
        return cls(plan, left, dict(map(tuple, plain["losses"])), worth, dict(map(tuple, plain["scales"])), slots)


def size_layers(
    dense: Dense,
    ratio: float,
    sensitivity: Sensitivity | None = None,
    neurons: bool = True,
    multiple: int | None = None,
    measured: float | None = None,
) -> list[Sizing]:
    """The options of every block, in the layers' order, around a stored ratio: in the two-sided metric, put right by
    `sensitivity`.

    `neurons`: whether blocks may lose some. `multiple`: of ranks, see `Budget.rank_multiple`. `measured`: share of the
    neurons at which true losses are taken, else `ratio`.
    """

    def size(layer: int) -> list[Sizing]:
        blocks = [dense.read(layer, kind) for kind in dense.blocks(layer)]
        changes = [_typical(ff, dense.source.names[layer], measured or ratio) for ff in blocks]
        scales = [1.0] * len(blocks)
        if sensitivity is not None:
            scales = sensitivity.measure(layer, changes)
        found = []
        for ff, scale in zip(blocks, scales, strict=True):
            saved = savings_of(ff, ratio, neurons)
            options = options_of(ff, saved, scale, neurons, multiple)
            found.append(Sizing(layer, ff.sites, options, scale, ff.elimination, saved))
        return found

    # in a function, so that one layer's tensors are freed before the next one's are there
    return [sizing for layer in track(dense.layers(), "sizing layers") for sizing in size(layer)]


def _typical(ff: FeedForward, prefix: str, ratio: float) -> Change:
    """Return a change to a block that leaves about `ratio` of it: fewer neurons, or where none can go lower ranks."""
    if ff.down is not None and ff.elimination is not None:
        count = max(1, round(ratio * ff.down.d_in))
        return Change(partial(ff.prune, prefix=prefix, neurons=count), ff.elimination.loss(count))
    ranks = {site.name: uniform_rank(site, ratio) for site in ff.sites}
    lost = sum(float(ff.target(site, None).savings[ranks[site.name] :].sum()) for site in ff.sites)
    return Change(partial(ff.truncate, prefix=prefix, ranks=ranks), lost)


def allocate(
    sizings: Sequence[Sizing],
    ratio: float,
    mac_ratio: float | None = None,
    shared: Sequence[Menu] = (),
    always: bool = False,
    elastic: bool = False,
) -> Allocation:
    """Spend at most `ratio` of the stored numbers, and `mac_ratio` of the MACs, at the least loss.

    shared: options of bands that share banks, groups being places in `sizings`
    always: these bands share, and the MAC ratio, where one is given, is spent to within TOLERANCE
    elastic: neurons stay in falling order of worth, for later cuts
    Raises BadInput if no plan is as small as that, or none spends the MACs.
    """
    banded = {place for menu in shared for place in menu.groups} if always else set[int]()
    menus = [Menu((place,), one.options) for place, one in enumerate(sizings) if place not in banded]
    menus += shared
    dense, macs = dense_size(sizings)
    most = 1.0 if mac_ratio is None and shared else mac_ratio
    limits = Limits(ratio * dense, None if most is None else most * macs)
    if always and mac_ratio is not None:
        fine = _spent(menus, _spending(limits, dense, macs, SLACK), _spending(limits, dense, macs, COARSE))
    else:
        chosen = choose_menus(menus, limits)
        fine = None if chosen is None else part_by_part(menus, chosen, limits)
    if fine is None and always and mac_ratio is not None and choose_menus(menus, limits) is not None:
        raise CannotSpend(_unspent(menus, limits, ratio, mac_ratio, macs))
    if fine is None:
        raise BadInput(_too_small(menus, ratio, mac_ratio, dense, macs))
    return allocation_of(sizings, ratio, fine, elastic)


def _spent(menus: Sequence[Menu], exact: Limits, coarse: Limits) -> list[Pick] | None:
    """Choose bands within coarse limits, and their parts within exact ones; other neurons where parts cannot be."""
    for _ in range(TRIES):
        chosen = choose_menus(menus, coarse)
        if chosen is None:
            return None
        fine = part_by_part(menus, chosen, exact)
        if fine is not None:
            return fine
        menus = without(menus, chosen)
    return None


def _spending(limits: Limits, dense: int, macs: int, slack: float) -> Limits:
    """Return the limits with all of both to be spent, less `slack` times TOLERANCE of the dense sizes."""
    assert limits.macs is not None
    return replace(
        limits,
        least_macs=limits.macs - slack * TOLERANCE * macs,
        least_stored=limits.stored - slack * TOLERANCE * dense,
    )


def _unspent(menus: Sequence[Menu], limits: Limits, ratio: float, mac_ratio: float, macs: int) -> str:
    """Say why both ratios cannot be spent, as one line."""
    most = _most_macs(menus, limits, macs)
    if most < mac_ratio - TOLERANCE:
        return (
            f"MACs of {mac_ratio:g} cannot be spent at ratio {ratio:g}: shared banks take up to about "
            f"{most:.2g} of the dense MACs there; lower --mac-ratio, or make bands longer"
        )
    return (
        f"ratio {ratio:g} cannot be spent with MACs of {mac_ratio:g}, a band that shares takes more MACs than it "
        "stores numbers: lower --ffn-ratio, or raise --mac-ratio"
    )


def dense_size(sizings: Sequence[Sizing]) -> tuple[int, int]:
    """Return the parameters, and the MACs per token, of the dense projections."""
    sites = [site for sizing in sizings for site in sizing.sites]
    return sum(site.parameters for site in sites), sum(site.d_in * site.d_out for site in sites)


def _most_macs(menus: Sequence[Menu], limits: Limits, macs: int) -> float:
    """Return the largest share of the dense MACs that can be spent within the limits, to within a hundredth."""
    low, high = 0.0, 1.0 if limits.macs is None else limits.macs / macs
    while high - low > TOLERANCE / 2:
        middle = (low + high) / 2
        found = choose_menus(menus, replace(limits, least_macs=middle * macs))
        low, high = (low, middle) if found is None else (middle, high)
    return low


def _too_small(menus: Sequence[Menu], ratio: float, mac_ratio: float | None, dense: int, macs: int) -> str:
    least = _least(menus, lambda option: option.stored) / dense
    if mac_ratio is not None and least <= ratio:
        lightest = _least(menus, lambda option: option.macs) / macs
        return (
            f"ratio {ratio:g} with MACs of at most {mac_ratio:g} is too small: the smallest plan takes "
            f"{lightest:.3g} of the dense MACs; raise --mac-ratio"
        )
    return f"ratio {ratio:g} is too small: the smallest plan stores {least:.3g} of the dense numbers"


def _least(menus: Sequence[Menu], cost: Callable[[Option], int]) -> float:
    """Return the least total cost: of each group the least share of any menu that covers it."""
    shares = dict[int, float]()
    for menu in menus:
        each = min(map(cost, menu.options)) / len(menu.groups)
        shares |= {group: min(each, shares.get(group, each)) for group in menu.groups}
    return sum(shares.values())


def allocation_of(sizings: Sequence[Sizing], ratio: float, chosen: Sequence[Pick], elastic: bool = False) -> Allocation:
    """Return the allocation that gives its groups, places in `sizings`, the `chosen` options; see `allocate`."""
    plan = Plan(ratio, _bands(sizings, chosen), [])
    left, losses, worth = dict[int, Tensor | None](), dict[int, float](), dict[int, Tensor]()
    for pick in chosen:
        choice, members = pick.option.what, [sizings[place] for place in pick.groups]
        assert isinstance(choice, Choice)
        shared, band = dict[str, list[Site]](), plan.band_of(members[0].layer)
        for sizing in members:
            if sizing.layer not in left or sizing.kind == "ffn":  # the only block that has neurons
                left[sizing.layer] = sizing.left(choice.neurons)
            if elastic:
                left[sizing.layer], worth[sizing.layer] = sizing.ordered(choice.neurons)
            losses[sizing.layer] = losses.get(sizing.layer, 0.0) + pick.option.loss / len(members)
            _plan_layer(plan, band, sizing, choice, shared)
        plan.banks.extend(BankPlan(band, role, tuple(shared[role]), *size) for role, size in choice.banks.items())
    scales = {sizing.layer: sizing.scale for sizing in sorted(sizings, key=lambda one: one.kind == "ffn")}
    return Allocation(plan, left, losses, worth, scales)


def _bands(sizings: Sequence[Sizing], chosen: Sequence[Pick]) -> list[list[int]]:
    """Return the layers of each band: those of one pick; an attention belongs to the band of its layer."""
    found: list[list[int]] = []
    for pick in sorted(chosen, key=lambda one: (-len(one.groups), one.groups)):
        layers = [sizings[place].layer for place in pick.groups]
        if not any(layers[0] in band for band in found):
            found.append(layers)
    return sorted(found)


def _plan_layer(plan: Plan, band: int, sizing: Sizing, choice: Choice, shared: dict[str, list[Site]]) -> None:
    """Add the parts of one layer to the plan, and its sites that share a bank to `shared`, by role."""
    for site in sizing.sites:
        small = site
        if choice.neurons is not None and sizing.elimination is not None:
            small = trimmed(site, choice.neurons, len(sizing.elimination.order))
            plan.host[site.name] = (site.d_in, site.d_out)
        rank = choice.ranks.get(site.name)
        if site.role in choice.banks:
            shared.setdefault(site.role, []).append(small)
        elif rank is None:
            plan.matrices.append(small)
        else:
            plan.banks.append(BankPlan(band, site.role, (small,), 1, rank, 1, own=len(plan.bands[band]) > 1))
