"""Sizes of a bank within a budget: how many primitives, of which rank, and how many of them a layer selects.

    stored numbers    n · r · (d_in + d_out), and each layer's composition
    MACs per token    k · r · (d_in + d_out) in each layer

A conversion, the search for shared banks and models that are trained from scratch all size their banks here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

RANKS = (64, 32, 16, 8, 4, 2, 1)  # multiples of 16 suit the kernels; small models need finer steps
FITTED_RANKS = RANKS[2:]  # of banks fitted to dense weights: wider primitives leave a layer little to choose from
WASTE = 0.04  # share of the budget that rounding to whole primitives may leave unused
COUNTS = 64  # numbers of primitives that are tried where only top_k is given
UNLIMITED = 1 << 60  # components, where MACs are not limited at all
MET = 0.01  # a ratio of stored numbers or MACs that is no farther off is the one that was asked for


class BankSize(NamedTuple):
    """Primitives n, their rank r, and top_k k: how many each layer selects."""

    n_primitives: int
    rank: int
    top_k: int


@dataclass(frozen=True)
class BankBudget:
    """Limits of one bank, or of several (`banks`) that are sized alike.

    pair: numbers of one component, d_in + d_out, summed over the banks
    stored: numbers at most, biases not among them
    components: top_k · rank of one layer at most, by MACs. `mac_limited` False: layers may select their even share of
    the primitives beyond that. recipes: compositions of each layer over one selection
    """

    layers: int
    pair: int
    full_rank: int
    stored: float
    components: int
    mac_limited: bool = True
    composition: str = "component"
    banks: int = 1
    recipes: int = 1

    def stored_by(self, size: BankSize) -> int:
        """Count the numbers that banks of that size and their compositions store."""
        compositions = self.banks * self.layers * composition_numbers(self.composition, size, self.recipes)
        return size.n_primitives * size.rank * self.pair + compositions

    def filled_by(self, size: BankSize) -> bool:
        """True if a bank of that size leaves at most WASTE of what the limits allow, or has every layer's full rank."""
        if self.composition != "softmax" and size.n_primitives >= self.layers * -(-self.full_rank // size.rank):
            return True
        spent = min(self.stored, self.layers * self.components * self.pair)
        selected = not self.mac_limited or size.top_k * size.rank >= (1 - WASTE) * min(
            self.components, size.n_primitives * size.rank
        )
        return selected and self.stored_by(size) >= (1 - WASTE) * spent


def composition_numbers(composition: str, size: BankSize, recipes: int = 1) -> int:
    """Count the numbers of one layer's composition: weights and selected indices, or the logits of a softmax.

    recipes: so many weights of one selection
    """
    if composition == "softmax":
        return size.n_primitives
    return size.top_k * (recipes * (size.rank if composition == "component" else 1) + 1)


def affordable(limit: float, fixed: float, price: float, most: int) -> int:
    """Return how many steps of a `price` fit into `limit` beside what is `fixed`: 0 to `most`."""
    return max(0, min(most, int((limit - fixed) // price)))


def size_private(budget: BankBudget, multiple: int = 1) -> BankSize | None:
    """Size one primitive for every layer: the largest rank within both limits; None if there is none.

    It is a multiple of `multiple` unless even that is too large.
    """
    most = min(budget.full_rank, budget.components)
    found = _largest(lambda rank: BankSize(1, rank, 1), most, budget)
    return found if found is None or found.rank < multiple else BankSize(1, found.rank // multiple * multiple, 1)


def size_bank(
    budget: BankBudget,
    n_primitives: int | None = None,
    rank: int | None = None,
    top_k: int | None = None,
    *,
    ranks: Sequence[int] = RANKS,
    own: int = 0,
    multiple: int = 1,
) -> BankSize | None:
    """Size a bank so that it fills the budget; None if not even the smallest one fits.

    What is given is kept, n_primitives and rank together even where they exceed the budget. With the rank open it is
    the largest of `ranks` that fills the budget to within WASTE, lets a layer select two primitives, and has `own`
    primitives for each layer; failing that, the one that stores most. Every primitive can be selected: n_primitives is
    at most top_k times the layers, but for softmax. An open rank is a multiple of `multiple` where the budget pays for
    one, even if that leaves more of it than WASTE.
    """
    if multiple > 1 and rank is None:
        ranks_of = [one for one in ranks if one % multiple == 0] or [multiple]
        if n_primitives is not None or top_k is not None:
            found = _size_rank(budget, n_primitives, top_k, multiple)
        else:
            found = size_bank(budget, ranks=ranks_of, own=own)
        if found is not None:
            return found
    if n_primitives is not None and rank is not None:
        return BankSize(n_primitives, rank, _top_k(budget, n_primitives, rank, top_k))
    if rank is None and (n_primitives is not None or top_k is not None):
        return _size_rank(budget, n_primitives, top_k)
    best: BankSize | None = None
    for each in (rank,) if rank is not None else ranks:
        found = _most_primitives(budget, each, top_k)
        if found is None:
            continue
        enough = found.n_primitives >= own * budget.layers and found.top_k >= 2
        if budget.filled_by(found) and (enough or each == 1 or rank is not None):
            return found
        if best is None or budget.stored_by(found) > budget.stored_by(best):
            best = found
    return best


@dataclass(frozen=True)
class Spending:
    """Hold the MACs that a shared bank is to spend, beside the limits of its `BankBudget`.

    components: k · r of one layer   most: components beyond which a layer costs no more, computed by one dense matrix
    slack: components by which a layer may miss that   spare: numbers by which the bank may miss what it may store
    """

    components: float
    most: float
    slack: float
    spare: float


def size_shared(budget: BankBudget, wanted: Spending, ranks: Sequence[int] = RANKS) -> BankSize | None:
    """Size a bank that stores what `budget` allows and of which each layer computes what is `wanted`.

    The rank is the largest of `ranks` with which a layer selects two primitives or more; None where none does.
    """
    found = [size for rank in ranks if rank <= budget.full_rank for size in _shared(budget, wanted, rank)]
    return next((size for size in found if size.top_k > 1), found[0] if found else None)


def _shared(budget: BankBudget, wanted: Spending, rank: int) -> Iterator[BankSize]:
    """Yield the sizes with that rank that meet both, the closest in components first."""
    low, high = (int((wanted.components + sign * wanted.slack) // rank) for sign in (-1, 1))
    if wanted.components >= wanted.most - wanted.slack:
        high = max(high, -(-int(wanted.most) // rank))
    exact = wanted.components / rank
    for k in sorted(range(max(1, low), high + 1), key=lambda k: abs(k - exact)):
        if abs(min(k * rank, wanted.most) - wanted.components) > wanted.slack or k > -(-budget.full_rank // rank):
            continue
        size = _largest(lambda n, k=k: BankSize(n, rank, k), k * budget.layers, budget)  # type: ignore[misc]
        if size is None or size.n_primitives < k:
            size = BankSize(k, rank, k)
        if abs(budget.stored_by(size) - budget.stored) <= wanted.spare:
            yield size


def most_components(budget: BankBudget) -> int:
    """Return the largest k · r of a bank whose layers select all of it."""
    return max((rank * _whole(budget, rank) for rank in RANKS if rank <= budget.full_rank), default=0)


def _whole(budget: BankBudget, rank: int) -> int:
    """Return the number of primitives of that rank that fit where every layer selects all."""
    size = _largest(lambda n: BankSize(n, rank, n), -(-budget.full_rank // rank), budget)
    return 0 if size is None else size.n_primitives


def _most_primitives(budget: BankBudget, rank: int, top_k: int | None) -> BankSize | None:
    """Return the bank of that rank with most primitives; None if there is none, or fewer than the given top_k."""
    if rank > budget.full_rank:
        return None
    selected = budget.components // rank if budget.mac_limited else budget.full_rank
    if top_k is not None:
        selected = top_k if top_k <= selected or not budget.mac_limited else 0
    usable = budget.layers * min(selected, -(-budget.full_rank // rank))
    if budget.composition == "softmax" and selected:
        usable = int(budget.stored // (rank * budget.pair))
    found = _largest(lambda n: BankSize(n, rank, _top_k(budget, n, rank, top_k)), usable, budget)
    return None if found is None or found.n_primitives < (top_k or 1) else found


def _size_rank(budget: BankBudget, n_primitives: int | None, top_k: int | None, multiple: int = 1) -> BankSize | None:
    """Size the rank of a bank whose n_primitives or top_k is given, or both.

    Of the banks that store the most, to within WASTE, it is one whose rank is a multiple of 16 if there is any, and of
    those the one of the largest rank, hence with the most sharing.
    """
    if n_primitives is not None:
        counts = [n_primitives]
    else:
        assert top_k is not None
        high = min(top_k * budget.layers, budget.layers * budget.full_rank)
        counts = list(range(top_k, high + 1, 1 + (high - top_k) // COUNTS))
    found: list[BankSize] = []
    for n in counts:
        selected = top_k or -(-n // budget.layers)
        most = min(budget.full_rank, max(budget.components // selected, not budget.mac_limited))
        largest = _largest(lambda rank, n=n: BankSize(n, rank, _top_k(budget, n, rank, top_k)), most, budget)  # type: ignore[misc]
        if largest is not None:
            step = max(multiple, 16)
            rounded = largest.rank // step * step
            found += [largest, *([BankSize(n, rounded, _top_k(budget, n, rounded, top_k))] if rounded else [])]
    found = [size for size in found if budget.stored_by(size) <= budget.stored and size.rank % multiple == 0]
    if not found:
        return None
    enough = (1 - WASTE) * max(budget.stored_by(size) for size in found)
    return max(
        (size for size in found if budget.stored_by(size) >= enough), key=lambda size: (size.rank % 16 == 0, size.rank)
    )


def _top_k(budget: BankBudget, n: int, rank: int, given: int | None) -> int:
    """Return the given top_k, or what the limit on MACs allows; without a limit an even share at least."""
    if given is not None:
        return min(given, n)
    selected = budget.components // rank
    if not budget.mac_limited:
        selected = max(selected, -(-n // budget.layers))
    return max(1, min(n, selected))


def _largest(sized: Callable[[int], BankSize], ceiling: int, budget: BankBudget) -> BankSize | None:
    """Return `sized` of the largest number up to `ceiling` whose bank fits: the stored size grows with the number."""
    low, high = 0, ceiling
    while low < high:
        middle = (low + high + 1) // 2
        if budget.stored_by(sized(middle)) <= budget.stored:
            low = middle
        else:
            high = middle - 1
    return sized(low) if low else None
