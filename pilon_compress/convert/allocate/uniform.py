"""Uniform sizes: every bank gets the budget's share of what it replaces, before anything is loaded or computed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from pilon_compress.config.budget import Budget
from pilon_compress.config.conversion import Method
from pilon_compress.convert.plan import BankPlan, Plan, blocks_of, down_of, trimmed
from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site
from pilon_compress.nn.bands import split_bands
from pilon_compress.nn.sizing import FITTED_RANKS, BankBudget, BankSize, affordable, size_bank, size_private

OWN_PRIMITIVES = 2  # primitives for each layer, at least: layers start from their own


def make_plan(sites: Sequence[Site], budget: Budget, method: Method, composition: str) -> Plan:
    """Solve n, r and k of every bank so that its stored size meets `budget.stored_limit` of the dense one.

    MACs stay within `budget.mac_limit`. `budget.n_primitives`, `rank` and `top_k` override the solution, and
    `check_limits` refuses those that cannot hold. Methods without sharing get one primitive of the
    largest rank that fits per layer. Raises BadInput for a band list that does not match the layers, for a budget too
    small for one primitive, and for a plan larger than the dense model unless `budget.allow_larger`.
    """
    layers = sorted({site.layer for site in sites})
    private = method != "pilon"
    bands = [[layer] for layer in layers] if private else split_bands(layers, budget.bands)
    if private and (budget.bands is not None or budget.n_primitives is not None or budget.top_k is not None):
        raise BadInput(f"method {method} shares nothing: bands, n_primitives and top_k do not apply")
    banks = []
    for index, band in enumerate(bands):
        for role in dict.fromkeys(site.role for site in sites):
            members = [site for site in sites if site.layer in band and site.role == role]
            shapes = {(site.d_in, site.d_out) for site in members}
            if len(shapes) > 1:
                raise BadInput(
                    f"band {index} mixes {role} projections of shapes {sorted(shapes)}: choose other --bands"
                )
            if members:
                empty = BankPlan(index, role, tuple(members), 0, 0, 0, composition)
                banks.append(size_of(empty, budget, private))
    stored, dense = sum(bank.stored() for bank in banks), sum(bank.dense_stored() for bank in banks)
    plan = Plan(budget.stored_limit if budget.limits_storage else stored / dense, bands, banks)
    if stored > dense and not budget.allow_larger:
        raise BadInput(
            f"the plan keeps {stored:,} numbers, more than the dense model's {dense:,}: "
            "lower the ratio, rank or n_primitives (or --allow-larger to study it)"
        )
    return plan


def preview(sites: Sequence[Site], ratio: float) -> Plan | None:
    """Return the plan with an equal share of neurons in every layer, and of the ranks of every attention; None where
    neurons cannot be pruned.

    The sizes of an allocated plan are about these; where they go, the calibration text decides.
    """
    layers: dict[int, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer, []).append(site)
    plan = Plan(ratio, [[layer] for layer in layers], [])
    for band, members in enumerate(layers.values()):
        blocks = blocks_of(members)
        if not _preview_neurons(plan, blocks.pop("ffn", []), ratio):
            return None
        for site in (site for block in blocks.values() for site in block):
            found = size_private(limits_of(BankPlan(band, site.role, (site,), 0, 0, 0), Budget(ratio=ratio)), 1)
            if found is None:
                return None
            plan.banks.append(BankPlan(band, site.role, (site,), *found))
    return plan


def _preview_neurons(plan: Plan, members: Sequence[Site], ratio: float) -> bool:
    """Add a feed-forward block with a share of its neurons to the plan; False where they cannot be pruned."""
    if not members:
        return True
    down = down_of(members)
    if down is None:
        return False
    fixed, dense = down.d_out * down.bias, sum(site.parameters for site in members)
    neurons = affordable(ratio * dense, fixed, (dense - fixed) // down.d_in, down.d_in)
    for site in members if neurons else ():
        plan.matrices.append(trimmed(site, neurons, down.d_in))
        plan.host[site.name] = (site.d_in, site.d_out)
    return neurons > 0


def dense_plan(sites: Sequence[Site]) -> Plan:
    """Return the plan at ratio 1: every projection stays a dense matrix."""
    return Plan(1.0, [[layer] for layer in sorted({site.layer for site in sites})], [], list(sites))


def size_of(empty: BankPlan, budget: Budget, private: bool) -> BankPlan:
    """The sizes of one bank within the budget's limits on stored numbers and on MACs: see `nn.sizing.size_bank`.

    `private`: one primitive of the largest rank for the one layer. Raises BadInput where nothing fits.
    """
    if budget.rank is not None and budget.rank > empty.full_rank:
        raise BadInput(
            f"rank {budget.rank} is above the full rank {empty.full_rank} of {empty.name}: lower it to that at most"
        )
    limits, multiple = limits_of(empty, budget), budget.rank_multiple or 1
    if not private:
        given = (budget.n_primitives, budget.rank, budget.top_k)
        found = size_bank(limits, *given, ranks=FITTED_RANKS, own=OWN_PRIMITIVES, multiple=multiple)
    elif budget.rank is not None:
        found = BankSize(1, budget.rank, 1)
    else:
        found = size_private(limits, multiple)
    return _too_small(empty, budget) if found is None else replace(empty, **found._asdict())


def limits_of(empty: BankPlan, budget: Budget) -> BankBudget:
    """Return the budget of one bank: its share of stored parameters and of MACs, or else the dense MACs."""
    pair, limit = empty.d_in + empty.d_out, budget.mac_limit
    return BankBudget(
        layers=len(empty.sites),
        pair=pair,
        full_rank=empty.full_rank,
        stored=budget.stored_limit * empty.dense_stored() - empty.biases(),
        components=int((1.0 if limit is None else limit) * empty.d_in * empty.d_out / pair + 1e-9),
        mac_limited=limit is not None,
        composition=empty.composition,
    )


def _too_small(empty: BankPlan, budget: Budget) -> NoReturn:
    limits = f"ratio {budget.stored_limit:g}"
    if budget.mac_limit is not None:
        limits += f" with MACs of at most {budget.mac_limit:g}"
    shape = {"primitives": budget.n_primitives, "selected by each layer": budget.top_k, "as rank": budget.rank}
    asked = ", ".join(f"{value} {name}" for name, value in shape.items() if value is not None)
    what = f"a bank of {asked}" if asked else "even one primitive of rank 1"
    raise BadInput(f"{limits} is too small for {what} in {empty.name}: raise it, or ask for less")


def check_limits(plan: Plan, budget: Budget) -> None:
    """Raise BadInput where a plan's given shapes exceed the budget, or leave primitives that no layer can select."""
    for bank in plan.banks:
        usable = bank.top_k * len(bank.sites)
        if bank.n_primitives > usable:
            few = budget.top_k is not None
            raise BadInput(
                f"{bank.name} has {bank.n_primitives} primitives, of which {len(bank.sites)} layers that select "
                f"{bank.top_k} each can use {usable}: lower n_primitives, or "
                + ("raise top_k" if few else "lower rank, or raise mac_ratio")
            )
    stored, dense = sum(bank.stored() for bank in plan.banks), sum(bank.dense_stored() for bank in plan.banks)
    if budget.limits_storage and stored > budget.stored_limit * dense * (1 + 1e-9):
        raise BadInput(
            f"the plan stores {stored / dense:.3g} of the dense numbers, above the ratio {budget.stored_limit:g}: "
            "lower rank, n_primitives or top_k, or raise --ffn-ratio"
        )
    macs = sum(bank.macs() for bank in plan.banks)
    dense_macs = sum(len(bank.sites) * bank.d_in * bank.d_out for bank in plan.banks)
    if budget.mac_limit is not None and macs > budget.mac_limit * dense_macs * (1 + 1e-9):
        raise BadInput(
            f"the plan takes {macs / dense_macs:.3g} of the dense MACs, above the limit {budget.mac_limit:g}: "
            "lower top_k or rank, or raise --mac-ratio"
        )
