"""Size banks of whole neurons: how many neurons each layer computes, and how many of them bands share.

The MACs say how many neurons layers have; where, the loss of pruning each decides. The stored numbers say how many of
them must be shared: those whose sharing costs least (`neurons.matching`), in the shortest bands that can.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from pilon_compress.convert.allocate.budget import TOLERANCE, Allocation, CannotSpend, Sizing, dense_size
from pilon_compress.convert.allocate.options import neuron_step
from pilon_compress.convert.neurons.matching import BandMetric, Group, Neurons, share
from pilon_compress.convert.plan import NeuronBankPlan, Plan, trimmed
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.elastic.knapsack import Limits, Menu, Option, choose_menus
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import track
from pilon_compress.nn.bands import split_bands
from pilon_compress.nn.size import ffn_size

MACS = 1.125  # of the stored ratio, where no MAC ratio is asked for: more lost (docs/results/sharing.md)


def allocate_neurons(
    dense: Dense,
    sizings: Sequence[Sizing],
    ratio: float,
    mac_ratio: float | None,
    bands: int | list[list[int]] | None = None,
) -> Allocation:
    """Spend `ratio` of the stored numbers and `mac_ratio` of the MACs, both to within TOLERANCE, on banks of neurons.

    bands: that share a bank; by default pairs of layers, or longer ones where the ratios need them
    Raises BadInput for blocks whose neurons cannot go, bands of blocks that differ in shape, and ratios that cannot be
    spent.
    """
    macs = min(1.0, MACS * ratio) if mac_ratio is None else mac_ratio
    if macs <= ratio:
        raise CannotSpend(
            f"MACs of {macs:g} leave none for shared neurons at ratio {ratio:g}: raise --mac-ratio above it"
        )
    _check(sizings)
    counts = _widths(sizings, macs)
    for split in _splits([sizing.layer for sizing in sizings], bands):
        found = _shared(dense, sizings, counts, ratio, split)
        if found is not None:
            _check_spent(found.plan, ratio, macs)
            return found
    raise CannotSpend(
        f"ratio {ratio:g} cannot be met with MACs of {macs:g}: neurons of these bands cannot be shared by as many "
        "layers; lower --mac-ratio, or make bands longer"
    )


def _check(sizings: Sequence[Sizing]) -> None:
    if any(sizing.elimination is None for sizing in sizings):
        raise BadInput(
            "budget.primitive neurons needs feed-forward blocks that are replaced as a whole: leave it out, "
            "or change --targets and --ignore"
        )
    if len(sizings) < 2:
        raise BadInput("budget.primitive neurons needs two layers or more, which share neurons: leave it out")


def _splits(layers: list[int], bands: int | list[list[int]] | None) -> list[list[list[int]]]:
    """Return the ways to split layers into bands, shortest bands first."""
    if bands is not None:
        return [split_bands(layers, bands)]
    counts = dict.fromkeys(max(1, len(layers) // length) for length in range(2, len(layers) + 1))
    return [split_bands(layers, count) for count in counts]


def _widths(sizings: Sequence[Sizing], macs: float) -> dict[int, int]:
    """Return the neurons of every layer: the least loss of pruning within a ratio of MACs."""
    menus = [Menu((place,), _options(sizing)) for place, sizing in enumerate(sizings)]
    total = sum(site.d_in * site.d_out for sizing in sizings for site in sizing.sites)
    picks = choose_menus(menus, Limits(macs * total))
    if picks is None:
        raise BadInput(f"MACs of {macs:g} are too few for one neuron in every layer: raise --mac-ratio")
    found = [pick.option.what for pick in picks]
    return {sizing.layer: count for sizing, count in zip(sizings, found, strict=True) if isinstance(count, int)}


def _options(sizing: Sizing) -> list[Option]:
    """List numbers of neurons, with their MACs as the numbers that are limited."""
    assert sizing.elimination is not None
    full = len(sizing.elimination.order)
    step, each = neuron_step(full), sum(site.d_in * site.d_out for site in sizing.sites) // full
    counts = [*range(step, full, step), full]
    return [Option(sizing.scale * sizing.elimination.loss(n), n * each, n * each, n) for n in counts]


def _shared(
    dense: Dense, sizings: Sequence[Sizing], counts: dict[int, int], ratio: float, bands: list[list[int]]
) -> Allocation | None:
    """Share as many neurons as `ratio` asks for; None where these bands cannot."""
    by_layer = {sizing.layer: sizing for sizing in sizings}
    members = [[by_layer[layer] for layer in band] for band in bands if len(band) > 1]
    plan = _plan(sizings, bands, counts, ratio)
    if not members:
        raise BadInput("budget.primitive neurons needs bands of two layers or more: change --bands")
    for band in members:
        _check_alike(band)
    excess = ffn_size(plan.layout()).stored - ratio * dense_size(sizings)[0]
    wanted = max(1, ceil(excess / max(map(_numbers, plan.neuron_banks))))
    if wanted > sum(sum(store.top_k) - max(store.top_k) for store in plan.neuron_banks):
        return None
    found = share([_describe(dense, band, counts) for band in track(members, "matching neurons")], wanted)
    return None if found is None else _allocation(plan, sizings, counts, found)


def _check_alike(members: Sequence[Sizing]) -> None:
    """Raise BadInput where the blocks of a band differ in shape."""
    shapes = {tuple(sorted((site.role, site.d_in, site.d_out) for site in sizing.sites)) for sizing in members}
    if len(shapes) > 1:
        layers = ", ".join(str(sizing.layer) for sizing in members)
        raise BadInput(f"the blocks of layers {layers} differ in shape, so they share no neurons: change --bands")


def _numbers(store: NeuronBankPlan) -> int:
    """Numbers of one neuron of a bank."""
    down = next(site for site in store.sites if site.role == "down")
    return sum(site.d_in * site.d_out // down.d_in for site in store.sites if site.layer == down.layer)


def _describe(dense: Dense, members: Sequence[Sizing], counts: dict[int, int]) -> dict[int, Neurons]:
    blocks = [dense.read(sizing.layer) for sizing in members]
    metric = BandMetric.of(blocks)
    return {
        sizing.layer: metric.neurons(block, _left(sizing, counts), sizing.scale)
        for sizing, block in zip(members, blocks, strict=True)
    }


def _left(sizing: Sizing, counts: dict[int, int]) -> Tensor:
    """Return the neurons of a layer that stay longest, ascending."""
    assert sizing.elimination is not None
    return sizing.elimination.left(counts[sizing.layer])


def _plan(sizings: Sequence[Sizing], bands: list[list[int]], counts: dict[int, int], ratio: float) -> Plan:
    """Return the plan with as many neurons in every bank as its layers use; layers that share with none are trimmed."""
    plan = Plan(ratio, bands, [])
    for index, band in enumerate(bands):
        inside = [site for sizing in sizings if sizing.layer in band for site in sizing.sites]
        top_k = tuple(counts[layer] for layer in sorted(band))
        if len(band) > 1:
            plan.neuron_banks.append(NeuronBankPlan(index, tuple(inside), sum(top_k), top_k))
            continue
        width = next(site.d_in for site in inside if site.role == "down")
        plan.matrices.extend(trimmed(site, top_k[0], width) for site in inside)
        if top_k[0] < width:
            plan.host.update({site.name: (site.d_in, site.d_out) for site in inside})
    return plan


def _allocation(
    plan: Plan, sizings: Sequence[Sizing], counts: dict[int, int], groups: Sequence[Sequence[Group]]
) -> Allocation:
    """Return the plan with banks of these groups; every layer's neurons in the order of its bank."""
    left = {sizing.layer: _left(sizing, counts) for sizing in sizings}
    losses = {s.layer: s.scale * s.elimination.loss(counts[s.layer]) for s in sizings if s.elimination is not None}
    slots = dict[int, Tensor]()
    for index, (store, found) in enumerate(zip(plan.neuron_banks, groups, strict=True)):
        plan.neuron_banks[index] = replace(store, neurons=len(found))
        for layer in store.layers:
            slots[layer] = torch.tensor([slot for slot, group in enumerate(found) if layer in group])
            left[layer] = left[layer][[group[layer] for group in found if layer in group]]
    scales = {sizing.layer: sizing.scale for sizing in sizings}
    return Allocation(plan, dict(left), losses, scales=scales, slots=slots)


def _check_spent(plan: Plan, ratio: float, macs: float) -> None:
    """Raise BadInput where the sizes are not those asked for, to within TOLERANCE: layers of few neurons."""
    size = ffn_size(plan.layout())
    stored, computed = size.stored / size.dense_stored, size.macs / size.dense_macs
    if max(abs(ratio - stored), abs(macs - computed)) > TOLERANCE:
        raise CannotSpend(
            f"ratio {ratio:g} with MACs of {macs:g} cannot be met to within {TOLERANCE:g} by banks of neurons: the "
            f"nearest store {stored:.3g} and compute {computed:.3g}; choose another ratio"
        )
