"""Layouts of blocks with experts: recipes over the bank of a band, and a router for each block.

    stored    the bank, all recipes, the routers        MACs    the active recipes and the router

Whatever the ratios, an expert selects what MACs pay for, and the bank is as large as what is stored pays for.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import floor

from pilon_compress.config.experts import ExpertsConfig
from pilon_compress.config.model import FfnConfig
from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site
from pilon_compress.models.shared_layouts import ROUND, add_neurons
from pilon_compress.nn.bands import split_bands
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import ffn_size, router_macs
from pilon_compress.nn.sizing import WASTE
from pilon_compress.nn.specs import RouterSpec


def expert_blocks(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Return the projections of every feed-forward block by the module name of the block.

    Raises BadInput where a block is no module of its own: routing would sort what else its module computes, too.
    """
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.name.rpartition(".")[0], []).append(site)
    layers = {site.layer for site in sites}
    if len(found) != len(layers) or any(name.rpartition(".")[2].isdigit() for name in found):
        raise BadInput(
            f"experts need a module for each feed-forward block: {sites[0].name} lies beside other parts of its layer"
        )
    return found


def router_spec(width: int, experts: ExpertsConfig) -> RouterSpec:
    """Return the router of a block whose input is `width` wide."""
    return RouterSpec(width, experts.experts, experts.top_k, experts.router, experts.shared, experts.mix)


def routers_for(sites: Sequence[Site], experts: ExpertsConfig) -> dict[str, RouterSpec]:
    """Return a router for every block. Raises BadInput as `expert_blocks`."""
    blocks = expert_blocks(sites)
    return {
        name: router_spec(next(s for s in block if s.role != "down").d_in, experts) for name, block in blocks.items()
    }


def router_numbers(site: Site, experts: ExpertsConfig) -> int:
    """Return the numbers of a block's router, and MACs, that count with one of two projections: half of them."""
    spec = router_spec(min(site.d_in, site.d_out), experts)
    return -(-(router_macs(spec) + spec.experts) // 2)


def expert_neurons(sites: Sequence[Site], ffn: FfnConfig, experts: ExpertsConfig) -> Layout:
    """Return banks of whole neurons, of which each expert selects some.

    With `share` none each block has a bank of its own. Raises BadInput where the budget pays for no neuron.
    """
    layers = sorted({site.layer for site in sites})
    bands = [[layer] for layer in layers] if ffn.share == "none" else split_bands(layers, ffn.bands)
    routers, host = routers_for(sites, experts), {site.name: (site.d_in, site.d_out) for site in sites}
    layout = Layout({}, {}, {}, host, routers=routers)
    for index, band in enumerate(bands):
        members = [site for site in sites if site.layer in band]
        neurons, top_k = _size(members, ffn, experts)
        add_neurons(layout, f"band{index}", members, neurons, top_k, ffn.scales, experts.recipes)
    return layout


def _size(members: Sequence[Site], ffn: FfnConfig, experts: ExpertsConfig) -> tuple[int, int]:
    """Return (neurons, top_k) of a band's bank: the largest within the budget, multiples of ROUND where that is one."""
    width = next(site.d_in for site in members if site.role == "down")
    dense, layers = sum(site.parameters for site in members), len({site.layer for site in members})
    per_layer = [site for site in members if site.layer == members[0].layer]
    router = router_macs(next(iter(routers_for(per_layer, experts).values())))
    macs = ffn.macs - router / sum(site.d_in * site.d_out for site in per_layer)
    inner = sum(site.d_in * site.d_out for site in per_layer) / width  # MACs of a neuron
    top_k = _rounded(floor(macs * width * inner / (inner * experts.passes + 4 * experts.mixed)))

    def stored(neurons: int, top_k: int) -> int:
        layout = Layout({}, {}, {}, {}, routers=routers_for(members, experts))
        add_neurons(layout, "band", members, neurons, top_k, ffn.scales, experts.recipes)
        return ffn_size(replace(layout, host={site.name: (site.d_in, site.d_out) for site in members})).stored

    if top_k > 0:
        fixed, more = (stored(top_k + extra, top_k) for extra in (1, 2))
        neurons = top_k + 1 + floor((ffn.ffn_ratio * dense - fixed) / (more - fixed))
        neurons = _rounded(min(neurons, layers * (1 if experts.mixed else experts.recipes) * top_k))
        if neurons > top_k:
            return neurons, top_k
        # each expert uses all neurons, with scales of its own
        while top_k and stored(top_k, top_k) > ffn.ffn_ratio * dense:
            top_k -= 1
        if top_k and ffn.scales:
            return top_k, top_k
    raise BadInput(
        "the budget pays for too few neurons for experts: raise ffn_ratio or mac_ratio, or lower moe.experts"
    )


def _rounded(neurons: int) -> int:
    """Return a multiple of ROUND, where that wastes few neurons."""
    multiple = neurons // ROUND * ROUND
    return multiple if multiple >= (1 - WASTE) * neurons else neurons
