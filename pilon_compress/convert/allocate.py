"""Where the budget goes: neurons, ranks and plain matrices of all layers by what they cost the model as a whole.

Every block offers options (`blocks.Block.options`) with their loss in the two-sided metric, one unit for the whole
model, and a multi-choice knapsack takes the best set within the budget. LEMS and ROCKET allocate ranks in this way;
here neurons, ranks and plain matrices compete.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pilon_compress.convert.blocks import Block, Choice
from pilon_compress.convert.knapsack import Option, choose
from pilon_compress.convert.moments import Moments
from pilon_compress.convert.plan import BankPlan, Plan, trimmed
from pilon_compress.convert.sensitivity import Sensitivity
from pilon_compress.convert.source import Source
from pilon_compress.errors import BadInput
from pilon_compress.families import Site
from pilon_compress.progress import track


@dataclass(frozen=True)
class Allocation:
    """A plan, and the neurons that stay by layer (None: all)."""

    plan: Plan
    left: dict[int, Tensor | None]


def allocate(
    source: Source,
    sites: Sequence[Site],
    moments: Moments,
    ratio: float,
    mac_ratio: float | None = None,
    sensitivity: Sensitivity | None = None,
) -> Allocation:
    """Spend at most `ratio` of the stored numbers of `sites`, and `mac_ratio` of their MACs, at the least loss.

    Losses are those of the two-sided metric, layer by layer put right by `sensitivity` where it is given.
    Raises BadInput if no plan is as small as that.
    """
    layers: dict[int, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer, []).append(site)
    menus: list[list[Option]] = []
    orders: dict[int, Tensor] = {}
    for layer, members in track(layers.items(), "sizing layers", total=len(layers)):
        with source.block(layer) as module:
            block = Block(layer, members, module, source.names[layer], moments)
        scale = 1.0
        if block.elimination is not None and block.down is not None:
            orders[layer] = block.elimination.order
            if sensitivity is not None:
                scale = sensitivity.measure(layer, block, max(1, round(ratio * block.down.d_in)))
        menus.append(block.options(ratio, scale))
    dense = sum(site.parameters for site in sites)
    macs = sum(site.d_in * site.d_out for site in sites)
    chosen = choose(menus, ratio * dense, None if mac_ratio is None else mac_ratio * macs)
    if chosen is None:
        least = sum(min(option.stored for option in menu) for menu in menus) / dense
        raise BadInput(f"ratio {ratio:g} is too small: the smallest plan stores {least:.3g} of the dense numbers")
    plan, left = Plan(ratio, [[layer] for layer in layers], []), {}
    for band, (layer, option) in enumerate(zip(layers, chosen, strict=True)):
        assert isinstance(option.what, Choice)
        left[layer] = _plan_layer(plan, band, layers[layer], option.what, orders.get(layer))
    return Allocation(plan, left)


def _plan_layer(plan: Plan, band: int, sites: Sequence[Site], choice: Choice, order: Tensor | None) -> Tensor | None:
    """Add a layer to `plan`; the neurons that stay."""
    left = None
    if choice.neurons is not None:
        assert order is not None
        left = order[len(order) - choice.neurons :].sort().values
    for site in sites:
        small = site
        if choice.neurons is not None and order is not None:
            small = trimmed(site, choice.neurons, len(order))
            plan.host[site.name] = (site.d_in, site.d_out)
        rank = choice.ranks[site.name]
        if rank is None:
            plan.kept.append(small)
        else:
            plan.banks.append(BankPlan(band, site.role, (small,), 1, rank, 1))
    return left
