"""Whether the layers of a band gain by sharing: their banks fitted jointly, against what each has of its own.

Layers that share have as many neurons as each other, and compose their weights from one bank per role that stores no
more than their own matrices and factors did. A band shares only if the joint fit's loss, in the metric that the
allocation used, is lower: sharing never costs quality, but it costs MACs, since every layer uses the whole bank.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pilon_compress.convert.allocate import Allocation, Sizing
from pilon_compress.convert.blocks import Block
from pilon_compress.convert.factorize import Target
from pilon_compress.convert.fit import BankFit, fit_bank
from pilon_compress.convert.moments import Moments
from pilon_compress.convert.plan import BankPlan, Plan, down_of, trimmed
from pilon_compress.convert.source import Source
from pilon_compress.families import Site
from pilon_compress.progress import track

WIDER = (1.25, 1.6)  # a shared block keeps so many times the neurons that its layers have alone
RANKS = (16, 8, 4, 2, 1)


def share(
    source: Source,
    sizings: Sequence[Sizing],
    alone: Allocation,
    moments: Moments,
    bands: Sequence[Sequence[int]],
    *,
    sweeps: int,
    seed: int = 0,
) -> tuple[Allocation, dict[str, BankFit]]:
    """The allocation with the bands that gain by sharing, and their banks as fitted, by name."""
    by_layer = {sizing.layer: sizing for sizing in sizings}
    plan = Plan(alone.plan.ratio, [], [], [], {})
    left, losses, fits = dict[int, Tensor | None](), dict[int, float](), dict[str, BankFit]()
    for layers in track(bands, "trying shared banks"):
        found = None
        if len(layers) > 1 and all(down_of(by_layer[layer].sites) is not None for layer in layers):
            found = _best(source, [by_layer[layer] for layer in layers], alone, moments, sweeps, seed, len(plan.bands))
        if found is None:
            for layer in layers:
                _copy_layer(alone, layer, plan)
                left[layer], losses[layer] = alone.left[layer], alone.losses[layer]
            continue
        banks, neurons, band_losses = found
        plan.bands.append(list(layers))
        for bank, fit in banks:
            plan.banks.append(bank)
            fits[bank.name] = fit
        for layer, loss in zip(layers, band_losses, strict=True):
            left[layer], losses[layer] = by_layer[layer].left(neurons), loss
            plan.host.update(
                {site.name: (site.d_in, site.d_out) for site in by_layer[layer].sites if neurons is not None}
            )
    return Allocation(plan, left, losses), fits


def _best(
    source: Source,
    sizings: Sequence[Sizing],
    alone: Allocation,
    moments: Moments,
    sweeps: int,
    seed: int,
    band: int,
) -> tuple[list[tuple[BankPlan, BankFit]], int | None, list[float]] | None:
    """The best way for a band to share: banks with their fits, neurons, loss by layer. None if alone is better."""
    layers = [sizing.layer for sizing in sizings]
    stored = sum(bank.stored() for bank in alone.plan.banks if bank.layers[0] in layers)
    stored += sum(site.parameters for site in alone.plan.kept if site.layer in layers)
    down = down_of(sizings[0].sites)
    assert down is not None
    widths = [down.d_in if (kept := alone.left[layer]) is None else len(kept) for layer in layers]
    mean = sum(widths) / len(widths)
    best, least = None, sum(alone.losses[layer] for layer in layers)
    for wider in WIDER:
        neurons = min(down.d_in, round(wider * mean / 8) * 8 or 1)
        tried = _fit(source, sizings, moments, None if neurons == down.d_in else neurons, stored, sweeps, seed, band)
        if tried is not None and sum(tried[1]) < least:
            best, least = (tried[0], None if neurons == down.d_in else neurons, tried[1]), sum(tried[1])
        if neurons == down.d_in:
            break
    return best


def _fit(
    source: Source,
    sizings: Sequence[Sizing],
    moments: Moments,
    neurons: int | None,
    stored: int,
    sweeps: int,
    seed: int,
    band: int,
) -> tuple[list[tuple[BankPlan, BankFit]], list[float]] | None:
    """One bank per role for layers with `neurons` each, within `stored` numbers; and the loss of every layer."""
    targets: dict[str, list[Target]] = {}
    small: dict[str, list[Site]] = {}
    losses = []
    for sizing in sizings:
        with source.block(sizing.layer) as module:
            block = Block(sizing.layer, sizing.sites, module, source.names[sizing.layer], moments)
        kept, elimination = sizing.left(neurons), sizing.elimination
        losses.append(0.0 if neurons is None or elimination is None else sizing.scale * elimination.loss(neurons))
        for site in sizing.sites:
            target = block.target(site, kept)
            assert target.gradient is not None
            targets.setdefault(site.role, []).append(replace(target, gradient=sizing.scale * target.gradient))
            width = 0 if elimination is None else len(elimination.order)
            small.setdefault(site.role, []).append(site if neurons is None else trimmed(site, neurons, width))
    plans = _plans(small, stored, band)
    if plans is None:
        return None
    banks = []
    for role, bank in plans.items():
        fit = fit_bank(targets[role], bank, seed, sweeps)
        losses = [loss + more for loss, more in zip(losses, fit.losses, strict=True)]
        banks.append((bank, fit))
    return banks, losses


def _plans(sites: dict[str, list[Site]], stored: int, band: int) -> dict[str, BankPlan] | None:
    """Banks of equally many components for every role, as many as `stored` pays for; None if that is too few."""
    fixed = sum(site.d_out for members in sites.values() for site in members if site.bias)
    price = sum(members[0].d_in + members[0].d_out + 2 * len(members) for members in sites.values())
    components = (stored - fixed) // price
    rank = next((rank for rank in RANKS if components // rank >= 4 * len(next(iter(sites.values())))), None)
    if rank is None:
        return None
    n = int(components // rank)
    return {role: BankPlan(band, role, tuple(members), n, rank, n) for role, members in sites.items()}


def _copy_layer(alone: Allocation, layer: int, plan: Plan) -> None:
    """Take one layer's own parts over, as a band of its own."""
    band = len(plan.bands)
    plan.bands.append([layer])
    plan.banks.extend(replace(bank, band=band) for bank in alone.plan.banks if bank.layers == [layer])
    mine = [site for site in alone.plan.kept if site.layer == layer]
    plan.kept.extend(mine)
    names = {site.name for site in mine} | {s.name for bank in plan.banks if bank.band == band for s in bank.sites}
    plan.host.update({name: shape for name, shape in alone.plan.host.items() if name in names})
