"""Layouts of models that are trained from scratch: banks, factors or narrower blocks within the budgets of a recipe.

share none      private factors, or blocks of fewer neurons          stored = MACs
moe             banks whose layers have several recipes                  `expert_layouts`
share always    banks whose layers compute more than they store      `shared_layouts`
"""

from collections.abc import Sequence
from dataclasses import replace

from pilon_compress.config.model import FfnConfig, TernaryConfig
from pilon_compress.errors import BadInput
from pilon_compress.io.messages import note
from pilon_compress.kernels.gpu_layout import MULTIPLE
from pilon_compress.models.expert_layouts import expert_neurons, router_numbers, routers_for
from pilon_compress.models.families import Site
from pilon_compress.models.shared_layouts import shared_factors, shared_neurons
from pilon_compress.nn.bands import split_bands
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import replaced_size
from pilon_compress.nn.sizing import BankBudget, size_bank, size_private
from pilon_compress.nn.specs import BankSpec, DenseSpec, ProjectionSpec

NOTED = 0.1  # of the budget's numbers: more is not left unspent without a word


def layout_for(sites: Sequence[Site], ffn: FfnConfig, ternary: TernaryConfig = TernaryConfig()) -> Layout | None:  # noqa: B008
    """Return banks and projections of at most `ffn_ratio` of the sites' parameters and `mac_ratio` of their MACs.

    With `share` always both ratios are met to within `sizing.MET`. lowrank: one primitive for each
    projection. dense: the matrices unchanged, None if they are not ternary either.
    Raises BadInput where the budget is too small for one primitive or for the shape that `ffn` gives, and for bands
    that do not partition the layers.
    """
    if ffn.kind == "dense":
        if not ternary.enabled:
            return None
        return with_ternary(dense_layout(sites), sites, ternary)
    multiple = MULTIPLE if ternary.enabled else 1
    layout = _shared(sites, ffn, multiple) if ffn.shares else None
    experts = ffn.moe if ffn.kind == "pilon" else None
    if experts is not None and ffn.primitive == "neurons":
        layout = expert_neurons(sites, ffn, experts)
    elif layout is None and ffn.kind == "pilon" and ffn.primitive == "neurons":
        layout = _narrowed(sites, ffn)
    elif layout is None:
        layout = _composed(sites, ffn, multiple)
        if ternary.enabled:
            _note_waste(layout, _composed(sites, ffn, 1))
        check_limits(layout, ffn)
    return with_ternary(layout, sites, ternary)


def _shared(sites: Sequence[Site], ffn: FfnConfig, multiple: int) -> Layout | None:
    """Return the layout whose layers share primitives; None where `share` auto finds none."""
    if ffn.primitive == "neurons":
        return shared_neurons(sites, ffn)
    return shared_factors(sites, widened(sites, ffn.neurons), ffn, multiple)


def _note_waste(layout: Layout, free: Layout) -> None:
    """Say how much of the budget `layout`, of ranks that suit the kernels, leaves, where `free` ranks leave less."""
    found, other = (replaced_size(one).over_dense().stored_ratio for one in (layout, free))
    if found < (1 - NOTED) * other:
        ranks = sorted({bank.rank for bank in free.banks.values()})
        note(
            f"ranks are multiples of {MULTIPLE}, which ternary kernels need not pad: {found:.2f} of the dense numbers "
            f"are stored; --set ffn.rank={ranks[-1]} would store {other:.2f}"
        )


def check_limits(layout: Layout, ffn: FfnConfig) -> None:
    """Raise BadInput where the shape that `ffn` gives exceeds its budget.

    Primitives that no layer can select do not count: a selection may explore them, and training ends without them.
    """
    banks = dict(layout.banks)
    for name, bank in banks.items():
        users = [layout.projections[user] for user in layout.users(name)]
        if users[0].composition != "softmax":
            used = sum(layout.projections[user].top_k * layout.selections(user) for user in layout.users(name))
            banks[name] = replace(bank, n_primitives=min(bank.n_primitives, used))
    size = replaced_size(replace(layout, banks=banks))
    stored, macs = size.stored / size.dense_stored, size.macs / size.dense_macs
    if stored > ffn.ffn_ratio * (1 + 1e-9):
        raise BadInput(
            f"the model stores {stored:.3g} of the dense FFN's numbers, above ffn.ffn_ratio {ffn.ffn_ratio:g}: "
            "lower ffn.rank, ffn.n_primitives or ffn.top_k, or raise ffn.ffn_ratio"
        )
    if macs > ffn.macs * (1 + 1e-9):
        raise BadInput(
            f"the model takes {macs:.3g} of the dense FFN's MACs, above ffn.mac_ratio {ffn.macs:g}: "
            "lower ffn.top_k or ffn.rank, or raise ffn.mac_ratio"
        )


def dense_layout(sites: Sequence[Site]) -> Layout:
    """Return the layout that keeps every projection a dense matrix of its own size."""
    return Layout({}, {}, {site.name: DenseSpec(site.d_in, site.d_out, site.bias) for site in sites})


def with_ternary(layout: Layout, sites: Sequence[Site], ternary: TernaryConfig) -> Layout:
    """Return `layout` with ternary weights, where `ternary` enables them."""
    down = [site.name for site in sites if site.role == "down"]
    return layout.ternary(down, ternary.group) if ternary.enabled else layout


def _composed(sites: Sequence[Site], ffn: FfnConfig, multiple: int) -> Layout:
    """Return a layout of banks that the layers of a band share, or one bank for each layer (lowrank).

    Ranks that `ffn` leaves open are multiples of `multiple`, where the budget pays for one.
    """
    wide = widened(sites, ffn.neurons)
    layers = sorted({site.layer for site in sites})
    private = ffn.kind == "lowrank" or ffn.share == "none"
    bands = [[layer] for layer in layers] if private else split_bands(layers, ffn.bands)
    banks: dict[str, BankSpec] = {}
    projections: dict[str, ProjectionSpec] = {}
    for index, band in enumerate(bands):
        for role in dict.fromkeys(site.role for site in wide):
            members = [site for site in wide if site.role == role and site.layer in band]
            dense = [site for site in sites if site.role == role and site.layer in band]
            bank, top_k = _size(members, dense, ffn, multiple)
            name = f"band{index}.{role}"
            banks[name] = bank
            composition = "component" if ffn.kind == "lowrank" else ffn.composition
            recipes = ffn.moe.recipes if ffn.moe is not None and ffn.kind == "pilon" else 1
            projections |= {
                site.name: ProjectionSpec(name, top_k, site.bias, composition, experts=recipes) for site in members
            }
    host = {d.name: (d.d_in, d.d_out) for d, w in zip(sites, wide, strict=True) if d != w}
    routers = routers_for(sites, ffn.moe) if ffn.moe is not None and ffn.kind == "pilon" else {}
    return Layout(banks, projections, {}, host, routers=routers)


def widened(sites: Sequence[Site], neurons: float) -> list[Site]:
    """Return the sites with the inner width times `neurons`, rounded to a multiple of 16."""
    if neurons == 1:
        return list(sites)

    def sized(width: int) -> int:
        return max(16, round(neurons * width / 16) * 16)

    return [
        replace(site, d_in=sized(site.d_in)) if site.role == "down" else replace(site, d_out=sized(site.d_out))
        for site in sites
    ]


def _narrowed(sites: Sequence[Site], ffn: FfnConfig) -> Layout:
    """Return a layout of dense matrices with fewer neurons, as in a small dense model."""
    down = next(site for site in sites if site.role == "down")
    width = int(min(ffn.ffn_ratio, ffn.macs) * down.d_in)
    width = width // 16 * 16 or width
    if width < 1:
        raise BadInput(f"ffn_ratio {ffn.ffn_ratio:g} is too small for one neuron: raise ffn_ratio or mac_ratio")
    narrow = [replace(s, d_in=width) if s.role == "down" else replace(s, d_out=width) for s in sites]
    matrices = {site.name: DenseSpec(site.d_in, site.d_out, site.bias) for site in narrow}
    return Layout({}, {}, matrices, {site.name: (site.d_in, site.d_out) for site in sites})


def _size(members: Sequence[Site], dense: Sequence[Site], ffn: FfnConfig, multiple: int) -> tuple[BankSpec, int]:
    """Return the bank of one band and role, and the number of its primitives that a layer selects."""
    site = members[0]
    pair = site.d_in + site.d_out
    stored = ffn.ffn_ratio * sum(one.parameters for one in dense) - sum(one.d_out for one in members if one.bias)
    macs, experts = ffn.macs * dense[0].d_in * dense[0].d_out, None
    if ffn.moe is not None and ffn.kind == "pilon":
        experts = ffn.moe
        router = router_numbers(dense[0], ffn.moe)  # this projection's part of its block's router
        stored, macs = stored - len(members) * router, macs - router
    # experts with selections of their own count as layers of their own; mixed ones as longer recipes of one layer
    own = experts.recipes if experts is not None and not experts.mixed else 1
    mixed = experts.mixed if experts is not None else 0
    budget = BankBudget(
        layers=len(members) * own,
        pair=pair,
        full_rank=min(site.d_in, site.d_out),
        stored=stored,
        components=min(int(macs / (pair * (experts.passes if experts else 1) + mixed)), site.d_in, site.d_out),
        composition="component" if ffn.kind == "lowrank" else ffn.composition,
        recipes=max(1, mixed),
    )
    if ffn.kind == "lowrank":
        size = size_private(budget, multiple)
        if size is None:
            raise BadInput(f"the budget pays for no rank in the {site.role} projections: raise ffn_ratio or mac_ratio")
        return BankSpec(site.d_in, site.d_out, 1, size.rank), 1
    size = size_bank(budget, ffn.n_primitives, ffn.rank, ffn.top_k, multiple=multiple)
    if size is None:
        raise BadInput(f"the budget pays for no primitive in the {site.role} projections: raise ffn_ratio or mac_ratio")
    spec = BankSpec(site.d_in, site.d_out, size.n_primitives, size.rank)
    return spec, size.top_k
