"""The plan: from a budget to bands, primitives, ranks and top-k, before anything is loaded or computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn

from pilon_compress.config.conversion import Budget, Method
from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site
from pilon_compress.nn.bands import split_bands
from pilon_compress.nn.layout import BankSpec, KeptSpec, Layout, ProjectionSpec

RANKS = (16, 8, 4, 2, 1)  # multiples of 16 suit the kernels; small models need finer steps
TRIED = 64  # numbers of primitives that are tried where top_k is given
WASTE = 0.025  # share of the budget that rounding to whole primitives may leave unused


@dataclass(frozen=True)
class BankPlan:
    """One bank to be fitted: the sites that share it and its sizes."""

    band: int
    role: str
    sites: tuple[Site, ...]
    n_primitives: int
    rank: int
    top_k: int
    composition: str = "component"

    @property
    def name(self) -> str:
        return f"band{self.band}.{self.role}"

    @property
    def layers(self) -> list[int]:
        return [site.layer for site in self.sites]

    @property
    def d_in(self) -> int:
        return self.sites[0].d_in

    @property
    def d_out(self) -> int:
        return self.sites[0].d_out

    @property
    def full_rank(self) -> int:
        return min(self.d_in, self.d_out)

    def stored(self) -> int:
        """Numbers kept: primitives, composition weights, selected indices, biases."""
        width = self.rank if self.composition == "component" else 1
        per_layer = self.top_k * (width + 1)
        biases = sum(self.d_out for site in self.sites if site.bias)
        return self.n_primitives * self.rank * (self.d_in + self.d_out) + len(self.sites) * per_layer + biases

    def dense_stored(self) -> int:
        return sum(site.parameters for site in self.sites)

    def macs(self) -> int:
        """Multiply-accumulates per token of all its layers; a composition dearer than its dense matrix is folded."""
        inner = self.top_k * self.rank * (self.d_in + self.d_out)
        return len(self.sites) * min(inner, self.d_in * self.d_out)

    def private_rank(self) -> int:
        """The rank that per-layer factors could have at this bank's stored size: what the baselines get."""
        free = self.stored() - sum(self.d_out for site in self.sites if site.bias)
        return max(1, min(self.full_rank, free // (len(self.sites) * (self.d_in + self.d_out))))


@dataclass(frozen=True)
class Plan:
    """Every bank of a conversion."""

    ratio: float
    bands: list[list[int]]
    banks: list[BankPlan]
    kept: list[Site] = field(default_factory=list)
    """Projections that stay one matrix."""
    host: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(d_in, d_out) in the dense model of the projections that lose neurons."""

    def layout(self, quantization: str | None = None) -> Layout:
        """What the PILON model will look like, in whole numbers if `quantization` says so."""
        kept = {site.name: KeptSpec(site.d_in, site.d_out, site.bias) for site in self.kept}
        specs = {bank.name: BankSpec(bank.d_in, bank.d_out, bank.n_primitives, bank.rank) for bank in self.banks}
        projections = {
            site.name: ProjectionSpec(bank.name, bank.top_k, site.bias, bank.composition)
            for bank in self.banks
            for site in bank.sites
        }
        made = Layout(specs, projections, kept, self.host)
        return made if quantization is None else made.integers(quantization)


def make_plan(sites: Sequence[Site], budget: Budget, method: Method, composition: str) -> Plan:
    """Solve n, r and k of every bank so that the stored size meets `budget.ratio` of the dense one, bank by bank.

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
                banks.append(solve_private(empty, budget) if private else solve(empty, budget))
    stored, dense = sum(bank.stored() for bank in banks), sum(bank.dense_stored() for bank in banks)
    plan = Plan(budget.ratio if budget.limits_storage else stored / dense, bands, banks)
    if stored > dense and not budget.allow_larger:
        raise BadInput(
            f"the plan keeps {stored:,} numbers, more than the dense model's {dense:,}: "
            "lower the ratio, rank or n_primitives (or --allow-larger to study it)"
        )
    return plan


def preview(sites: Sequence[Site], ratio: float) -> Plan | None:
    """What an allocation starts from: every layer keeps the same share of its neurons. None where blocks are not whole.

    The sizes of an allocated plan are about these; where they go, the calibration text decides.
    """
    layers: dict[int, list[Site]] = {}
    for site in sites:
        layers.setdefault(site.layer, []).append(site)
    plan = Plan(ratio, [[layer] for layer in layers], [])
    for members in layers.values():
        down = down_of(members)
        if down is None:
            return None
        fixed = sum(site.d_out for site in members if site.bias and site is down)
        price = sum(site.parameters for site in members) - fixed
        neurons = int((ratio * (price + fixed) - fixed) * down.d_in // price)
        if neurons < 1:
            return None
        for site in members:
            plan.kept.append(trimmed(site, neurons, down.d_in))
            plan.host[site.name] = (site.d_in, site.d_out)
    return plan


def keep_whole(sites: Sequence[Site]) -> Plan:
    """Every projection as one matrix of the dense size: the plan at ratio 1."""
    return Plan(1.0, [[layer] for layer in sorted({site.layer for site in sites})], [], list(sites))


def down_of(sites: Sequence[Site]) -> Site | None:
    """The projection that reads the neurons which all others of the layer make; None where neurons cannot be dropped.

    They can where all projections of a block are to be replaced.
    """
    downs = [site for site in sites if site.role == "down"]
    ups = [site for site in sites if site.role in ("up", "gate", "gate_up")]
    if len(downs) != 1 or len(ups) != len(sites) - 1 or {site.name for site in sites} != set(downs[0].block):
        return None
    width = downs[0].d_in
    fused = len(ups) == 1 and ups[0].role == "gate_up" and ups[0].d_out == 2 * width
    plain = any(up.role == "up" for up in ups) and all(up.d_out == width for up in ups)
    return downs[0] if fused or plain else None


def trimmed(site: Site, neurons: int, width: int) -> Site:
    """The site with `neurons` of its block's `width` left."""
    if site.role == "down":
        return replace(site, d_in=neurons)
    return replace(site, d_out=site.d_out // width * neurons)


def solve_private(empty: BankPlan, budget: Budget) -> BankPlan:
    """One primitive per layer: the largest rank within both limits of the budget, or its own rank."""
    sized = partial(replace, empty, n_primitives=1, top_k=1)
    if budget.rank is not None:
        return sized(rank=_checked_rank(empty, budget.rank))
    most = empty.full_rank if budget.mac_limit is None else min(empty.full_rank, _components(empty, budget))
    return _largest(lambda rank: sized(rank=rank), most, budget.ratio) or _too_small(empty, budget)


def solve(empty: BankPlan, budget: Budget) -> BankPlan:
    """Sizes of one bank, within the budget's limits on stored numbers and on MACs, that fill it to within WASTE.

    `budget.n_primitives`, `rank` and `top_k` are kept where given, and what is left is solved: the largest rank in
    RANKS that gives every layer two primitives of its own, or any rank where n_primitives or top_k is given. Every
    primitive of a solved bank can be selected: n_primitives is at most top_k times the layers.
    """
    if budget.rank is not None:
        _checked_rank(empty, budget.rank)
        if budget.n_primitives is not None:
            n = budget.n_primitives
            return replace(empty, n_primitives=n, rank=budget.rank, top_k=_top_k(empty, n, budget.rank, budget))
    elif budget.n_primitives is not None or budget.top_k is not None:
        return _solve_rank(empty, budget)
    layers, best = len(empty.sites), None
    for rank in (budget.rank,) if budget.rank else RANKS:
        if rank > empty.full_rank:
            continue

        def sized(n: int, rank: int = rank) -> BankPlan:
            return replace(empty, n_primitives=n, rank=rank, top_k=_top_k(empty, n, rank, budget))

        ceiling = layers * -(-empty.full_rank // rank)  # the layers' full ranks side by side: more adds nothing
        usable = min(ceiling, layers * _most_selected(empty, rank, budget))
        found = _largest(sized, usable, budget.ratio)
        if found is None or found.n_primitives < (budget.top_k or 1):
            continue
        full = found.n_primitives == ceiling or found.stored() >= (1 - WASTE) * _goal(empty, budget)
        if full and (found.n_primitives >= 2 * layers or rank == 1 or budget.rank):
            return found
        if best is None or found.stored() > best.stored():
            best = found
    return best or _too_small(empty, budget)


def _solve_rank(empty: BankPlan, budget: Budget) -> BankPlan:
    """The bank with the rank left open, for a given n_primitives or top_k, or both.

    Of the banks that fill the budget to within WASTE it is one whose rank is a multiple of 16 if there is any, and of
    those the one of the largest rank, hence with the most sharing, whose MACs stay at the dense model's or below.
    """
    layers, best = len(empty.sites), list[BankPlan]()
    if budget.n_primitives is not None:
        counts = [budget.n_primitives]
    else:
        assert budget.top_k is not None
        low, high = budget.top_k, min(budget.top_k * layers, layers * empty.full_rank)
        counts = list(range(low, high + 1, 1 + (high - low) // TRIED))
    for n in counts:
        selected = budget.top_k or -(-n // layers)
        most = min(empty.full_rank, max(_components(empty, budget) // selected, budget.mac_limit is None))

        def sized(rank: int, n: int = n) -> BankPlan:
            return replace(empty, n_primitives=n, rank=rank, top_k=_top_k(empty, n, rank, budget))

        largest = _largest(sized, most, budget.ratio)
        if largest is not None:
            rounded = largest.rank // RANKS[0] * RANKS[0]
            best += [largest, *([sized(rounded)] if rounded else [])]
    best = [bank for bank in best if bank.stored() <= budget.ratio * bank.dense_stored()]
    if not best:
        _too_small(empty, budget)
    enough = (1 - WASTE) * max(bank.stored() for bank in best)
    return max((bank for bank in best if bank.stored() >= enough), key=lambda bank: (bank.rank % 16 == 0, bank.rank))


def _checked_rank(empty: BankPlan, rank: int) -> int:
    if rank > empty.full_rank:
        raise BadInput(
            f"rank {rank} is above the full rank {empty.full_rank} of {empty.name}: lower it to that at most"
        )
    return rank


def _components(empty: BankPlan, budget: Budget) -> int:
    """Components (top_k · rank) of one layer that the limit on MACs allows; without one as many as dense MACs pay."""
    limit = 1.0 if budget.mac_limit is None else budget.mac_limit
    return int(limit * empty.d_in * empty.d_out / (empty.d_in + empty.d_out) + 1e-9)


def _most_selected(empty: BankPlan, rank: int, budget: Budget) -> int:
    """Primitives of `rank` that one layer may select within the limit on MACs; 0 if not even the given top_k."""
    most = empty.full_rank if budget.mac_limit is None else _components(empty, budget) // rank
    if budget.top_k is None:
        return most
    return budget.top_k if budget.top_k <= most or budget.mac_limit is None else 0


def _goal(empty: BankPlan, budget: Budget) -> float:
    """Stored numbers that the limits allow: the ratio's, or as many as private factors within the MACs have."""
    stored = budget.ratio * empty.dense_stored()
    if budget.mac_limit is None:
        return stored
    return min(stored, len(empty.sites) * _components(empty, budget) * (empty.d_in + empty.d_out))


def _top_k(empty: BankPlan, n: int, rank: int, budget: Budget) -> int:
    """The given top_k, or as many primitives as the MACs allow: the limit's, else dense ones and an even share."""
    if budget.top_k is not None:
        return min(budget.top_k, n)
    affordable = _components(empty, budget) // rank
    if budget.mac_limit is None:
        affordable = max(affordable, -(-n // len(empty.sites)))
    return max(1, min(n, affordable))


def _largest(sized: Callable[[int], BankPlan], ceiling: int, ratio: float) -> BankPlan | None:
    low, high = 0, ceiling  # bisection: the stored size grows with the number of primitives
    while low < high:
        middle = (low + high + 1) // 2
        plan = sized(middle)
        if plan.stored() <= ratio * plan.dense_stored():
            low = middle
        else:
            high = middle - 1
    return sized(low) if low else None


def _too_small(empty: BankPlan, budget: Budget) -> NoReturn:
    limits = f"ratio {budget.ratio:g}"
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
    if budget.limits_storage and stored > budget.ratio * dense * (1 + 1e-9):
        raise BadInput(
            f"the plan stores {stored / dense:.3g} of the dense numbers, above the ratio {budget.ratio:g}: "
            "lower rank, n_primitives or top_k, or raise --ffn-ratio"
        )
    macs = sum(bank.macs() for bank in plan.banks)
    dense_macs = sum(len(bank.sites) * bank.d_in * bank.d_out for bank in plan.banks)
    if budget.mac_limit is not None and macs > budget.mac_limit * dense_macs * (1 + 1e-9):
        raise BadInput(
            f"the plan takes {macs / dense_macs:.3g} of the dense MACs, above the limit {budget.mac_limit:g}: "
            "lower top_k or rank, or raise --mac-ratio"
        )
