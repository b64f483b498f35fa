"""Layouts whose layers share primitives: MACs beyond the stored numbers are spent on banks that several layers use.

    a band of L layers, the whole bank selected     MACs = L · stored
    a longer band, a part of the bank selected      MACs between stored and L · stored

The bands are the shortest that can spend the MACs; both ratios are met to within `sizing.MET`.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor
from typing import NamedTuple, TypeVar

from pilon_compress.config.model import FfnConfig
from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site
from pilon_compress.nn.bands import split_bands
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.neuron_linear import has_scale
from pilon_compress.nn.size import neuron_size
from pilon_compress.nn.sizing import MET, RANKS, BankBudget, BankSize, Spending, most_components, size_shared
from pilon_compress.nn.specs import BankSpec, NeuronBankSpec, NeuronSpec, ProjectionSpec

ROUND = 16  # neurons are a multiple of it where the ratios allow that
Sized = TypeVar("Sized")


class Target(NamedTuple):
    """Ratios of stored numbers and of MACs over dense, and how far off each may be."""

    stored: float
    macs: float
    off: float


def target_of(ffn: FfnConfig) -> Target:
    """Return the ratios to meet: those that are asked for, or with `auto` just below them, which are then limits."""
    if ffn.share == "always":
        return Target(ffn.ffn_ratio, ffn.macs, MET)
    return Target(ffn.ffn_ratio - MET / 2, ffn.macs - MET / 2, MET / 2)


def shared_factors(dense: Sequence[Site], wide: Sequence[Site], ffn: FfnConfig, multiple: int = 1) -> Layout | None:
    """Return banks of low-rank primitives for the sites `wide`, whose sizes count over those of `dense`.

    Open ranks are multiples of `multiple` where that meets the ratios. Raises BadInput with `share` always, and
    returns None with `auto`, where the ratios cannot both be met.
    """
    roles = list(dict.fromkeys(site.role for site in wide))

    def budgets(band: list[int], stored: float) -> list[tuple[str, BankBudget, float]]:
        return [(role, *_budget(_of(wide, band, role), _of(dense, band, role), ffn, stored)) for role in roles]

    def sized(band: list[int], target: Target) -> dict[str, BankSize] | None:
        found: dict[str, BankSize] = {}
        for role, budget, most in budgets(band, target.stored):
            numbers = sum(site.parameters for site in _of(dense, band, role))
            wanted = Spending(min(target.macs, 1) * most, most, target.off * most, target.off * numbers)
            ranks = [ffn.rank] if ffn.rank else [rank for rank in RANKS if rank % multiple == 0]
            size = size_shared(budget, wanted, ranks) or (None if ffn.rank else size_shared(budget, wanted))
            if size is None:
                return None
            found[role] = size
        return found

    def highest(band: list[int], target: Target) -> float:
        return min(most_components(budget) / most for _, budget, most in budgets(band, target.stored))

    chosen = _spend(dense, ffn, sized, highest)
    if chosen is None:
        return None
    layout = Layout({}, {}, {}, {d.name: (d.d_in, d.d_out) for d, w in zip(dense, wide, strict=True) if d != w})
    for index, (band, sizes) in enumerate(chosen):
        for role, size in sizes.items():
            members, name = _of(wide, band, role), f"band{index}.{role}"
            layout.banks[name] = BankSpec(members[0].d_in, members[0].d_out, size.n_primitives, size.rank)
            for site in members:
                layout.projections[site.name] = ProjectionSpec(name, size.top_k, site.bias, ffn.composition)
    return layout


def shared_neurons(sites: Sequence[Site], ffn: FfnConfig) -> Layout | None:
    """Return banks of whole neurons for the blocks that the sites make up; otherwise as `shared_factors`."""

    def sized(band: list[int], target: Target) -> tuple[int, int] | None:
        return size_neurons([site for site in sites if site.layer in band], target, ffn.scales)

    def highest(band: list[int], target: Target) -> float:
        return _most_neurons([site for site in sites if site.layer in band], target, ffn.scales)

    chosen = _spend(sites, ffn, sized, highest)
    if chosen is None:
        return None
    layout = Layout({}, {}, {}, {site.name: (site.d_in, site.d_out) for site in sites})
    for index, (band, size) in enumerate(chosen):
        add_neurons(layout, f"band{index}", [site for site in sites if site.layer in band], *size, ffn.scales)
    return layout


def _spend(
    sites: Sequence[Site],
    ffn: FfnConfig,
    sized: Callable[[list[int], Target], Sized | None],
    highest: Callable[[list[int], Target], float],
) -> list[tuple[list[int], Sized]] | None:
    """Return the shortest bands that meet the ratios, each with its sizes; `highest`: MACs that a band can spend."""
    layers, target = sorted({site.layer for site in sites}), target_of(ffn)
    if ffn.bands is not None:
        choices = [split_bands(layers, ffn.bands)]
    else:
        counts = dict.fromkeys(len(layers) // length for length in range(2, len(layers) + 1))
        choices = [split_bands(layers, count) for count in counts] or [[layers]]
    top = min(highest(band, target) for band in choices[-1])
    for macs in _steps(min(target.macs, top), ffn.ffn_ratio) if ffn.share == "auto" else [target.macs]:
        for bands in choices:
            found = [(band, sized(band, target._replace(macs=macs))) for band in bands]
            if all(size is not None for _, size in found):
                return [(band, size) for band, size in found if size is not None]
    if ffn.share == "auto":
        return None
    if target.macs > top + target.off:
        most = max(len(band) for band in choices[-1])
        raise BadInput(
            f"ffn.mac_ratio {ffn.macs:g} cannot be spent with ffn.ffn_ratio {ffn.ffn_ratio:g} in bands of {most} "
            f"layers: lower it to {floor(100 * top) / 100:g} at most, or raise ffn_ratio"
        )
    given = [f"ffn.{name}" for name in ("rank", "bands") if getattr(ffn, name) is not None]
    raise BadInput(
        f"no banks store {ffn.ffn_ratio:g} and compute {ffn.macs:g} of the dense model to within {MET:g}: "
        f"{'leave out ' + ' and '.join(given) + ', or ' if given else ''}choose another ffn_ratio or mac_ratio"
    )


def _steps(macs: float, stored: float) -> list[float]:
    """Return MAC ratios from `macs` down to `stored`, in steps that leave no gap between their tolerances."""
    return [macs - MET * step for step in range(ceil(max(0.0, macs - stored) / MET))]


def _of(sites: Sequence[Site], band: list[int], role: str) -> list[Site]:
    return [site for site in sites if site.layer in band and site.role == role]


def _budget(members: Sequence[Site], dense: Sequence[Site], ffn: FfnConfig, stored: float) -> tuple[BankBudget, float]:
    """Return the budget of one bank, and the components whose MACs are those of the dense projections."""
    site, pair = members[0], members[0].d_in + members[0].d_out
    most = dense[0].d_in * dense[0].d_out / pair
    budget = BankBudget(
        layers=len(members),
        pair=pair,
        full_rank=min(site.d_in, site.d_out),
        stored=stored * sum(one.parameters for one in dense) - sum(one.d_out for one in members if one.bias),
        components=ceil(most),
        composition=ffn.composition,
    )
    return budget, most


def size_neurons(blocks: Sequence[Site], target: Target, scales: bool) -> tuple[int, int] | None:
    """Return (neurons, top_k) of a bank for the blocks that the sites make up; None where none meets the target."""
    width = next(site.d_in for site in blocks if site.role == "down")
    dense = sum(site.parameters for site in blocks)

    def met(neurons: int, top_k: int) -> bool:
        stored = _stored(blocks, neurons, top_k, scales) / dense
        off = target.off + 1e-9
        return abs(top_k / width - target.macs) <= off and abs(stored - target.stored) <= off

    top_k = round(target.macs * width)
    whole = max(floor(_most_neurons(blocks, target, scales) * width), ceil((target.macs - target.off) * width - 1e-9))
    few = top_k // ROUND * ROUND
    pairs = [(n // ROUND * ROUND, k) for k in (few, top_k) for n in [_neurons(blocks, k, target, scales)]]
    pairs += [(_neurons(blocks, k, target, scales), k) for k in (few, top_k)]
    pairs = [(n, k) for n, k in pairs if n > k > 0]
    pairs += [(n, n) for n in (whole // ROUND * ROUND, whole) if n > 0]
    return next((pair for pair in pairs if met(*pair)), None)


def _neurons(blocks: Sequence[Site], top_k: int, target: Target, scales: bool) -> int:
    """Return how many neurons the budget pays for where each block selects `top_k` of them."""
    dense, some = sum(site.parameters for site in blocks), top_k + 1
    fixed, more = (_stored(blocks, neurons, top_k, scales) for neurons in (some, some + 1))
    return some + floor((target.stored * dense - fixed) / (more - fixed))


def _most_neurons(blocks: Sequence[Site], target: Target, scales: bool) -> float:
    """Return the largest ratio of MACs: of blocks that all use a whole bank."""
    width = next(site.d_in for site in blocks if site.role == "down")
    dense = sum(site.parameters for site in blocks)
    one, two = (_stored(blocks, neurons, neurons, scales) for neurons in (1, 2))
    return min(1.0, floor(1 + (target.stored * dense - one) / (two - one)) / width)


def _stored(blocks: Sequence[Site], neurons: int, top_k: int, scales: bool) -> int:
    layout = Layout({}, {}, {}, {site.name: (site.d_in, site.d_out) for site in blocks})
    add_neurons(layout, "band", blocks, neurons, top_k, scales)
    return neuron_size(layout, "band").stored


def add_neurons(
    layout: Layout,
    name: str,
    blocks: Sequence[Site],
    neurons: int,
    top_k: int | Mapping[int, int],
    scales: bool,
    experts: int = 1,
) -> None:
    """Add a bank of neurons to `layout`, in place, for the blocks of the sites; `top_k`: of all, or by layer.

    experts: recipes of each block
    """
    gated = any(site.role in ("gate", "gate_up") for site in blocks)
    down = next(site for site in blocks if site.role == "down")
    first = {site.layer: site.name for site in reversed(blocks)}
    layout.neuron_banks[name] = NeuronBankSpec(neurons, down.d_out, down.d_out, gated)
    for site in blocks:
        count = top_k if isinstance(top_k, int) else top_k[site.layer]
        selection = first[site.layer] if count < neurons else ""
        scaled = scales and has_scale(site.role, gated)
        layout.neurons[site.name] = NeuronSpec(name, site.role, count, site.bias, selection, scaled, experts)
