"""Banks within a budget: both limits hold, what is given is kept, and what the limits allow is spent."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilon_compress.nn.sizing import RANKS, WASTE, BankBudget, BankSize, affordable, size_bank, size_private

budgets = st.builds(
    BankBudget,
    layers=st.integers(1, 6),
    pair=st.integers(20, 400),
    full_rank=st.integers(4, 100),
    stored=st.integers(10, 200_000),
    components=st.integers(1, 80),
    mac_limited=st.booleans(),
    composition=st.sampled_from(["component", "scalar", "softmax"]),
    banks=st.integers(1, 3),
)


def numbers_by_hand(budget, size):
    n, r, k = size
    each = {"component": k * r + k, "scalar": 2 * k, "softmax": n}[budget.composition]
    return n * r * budget.pair + budget.banks * budget.layers * each


@settings(max_examples=300, deadline=None)
@given(budgets, st.sampled_from([0, 1, 2, 4]))
def test_a_bank_keeps_to_its_limits_and_takes_all_that_fits_at_its_rank(budget, own):
    size = size_bank(budget, own=own)
    smallest = BankSize(1, 1, 1)
    if size is None:
        assert numbers_by_hand(budget, smallest) > budget.stored
        return
    n, r, k = size
    assert 1 <= k <= n and r in RANKS and r <= budget.full_rank
    assert numbers_by_hand(budget, size) == budget.stored_by(size) <= budget.stored
    assert not budget.mac_limited or k * r <= budget.components
    assert budget.composition == "softmax" or n <= k * budget.layers, "every primitive can be selected"
    more = BankSize(n + 1, r, min(k + 1, n + 1))
    full = n >= budget.layers * -(-budget.full_rank // r) or n + 1 > budget.layers * (budget.components // r)
    assert full or numbers_by_hand(budget, more) > budget.stored


@settings(max_examples=100, deadline=None)
@given(budgets, st.sampled_from(RANKS))
def test_another_rank_that_fills_the_budget_better_is_no_larger(budget, other):
    """The largest rank that fills the budget with a choice for every layer is taken; failing that, the fullest bank."""
    size, rival = size_bank(budget), size_bank(budget, rank=other) if other <= budget.full_rank else None
    if size is None or rival is None:
        return
    good = budget.filled_by(rival) and rival.top_k >= 2
    if good:
        assert size.rank >= other or budget.filled_by(size)
    if not (budget.filled_by(size) and (size.top_k >= 2 or size.rank == 1)):
        assert budget.stored_by(size) >= budget.stored_by(rival) and not good


@settings(max_examples=200, deadline=None)
@given(budgets, st.sampled_from([2, 16]), st.sampled_from([{}, {"n_primitives": 3}, {"top_k": 2}]))
def test_ranks_are_multiples_where_the_budget_pays_for_one(budget, multiple, given_sizes):
    size = size_bank(budget, **given_sizes, multiple=multiple)
    if size is None:
        assert size_bank(budget, **given_sizes) is None
        return
    assert budget.stored_by(size) <= budget.stored
    if size.rank % multiple:
        assert size == size_bank(budget, **given_sizes), "as if nothing was asked for"
        fits = multiple <= budget.full_rank and not (budget.mac_limited and multiple > budget.components)
        assert given_sizes or not fits or numbers_by_hand(budget, BankSize(1, multiple, 1)) > budget.stored


def test_what_is_given_is_kept():
    budget = BankBudget(3, 1920, 384, 0.5 * 3 * 384 * 1536, 150)
    for given_sizes in ({"n_primitives": 12}, {"rank": 8}, {"top_k": 4}, {"n_primitives": 20, "top_k": 8}):
        size = size_bank(budget, **given_sizes)
        assert all(getattr(size, name) == value for name, value in given_sizes.items())
        assert budget.stored_by(size) <= budget.stored and size.top_k * size.rank <= 150
    assert size_bank(budget, n_primitives=999, rank=30, top_k=5) == (999, 30, 5), "both together win over the budget"
    assert size_bank(budget, rank=385) is None


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("macs", [1.0, 0.5])
def test_a_budget_from_scratch_is_spent(ratio, macs):
    """Check that large shapes leave little of a budget, also where MACs or stored numbers alone allow far more."""
    d, inner, layers = 512, 2048, 3
    components = int(macs * d * inner / (d + inner))
    budget = BankBudget(layers, d + inner, d, ratio * layers * d * inner, components)
    size = size_bank(budget)
    assert budget.stored_by(size) >= (1 - WASTE) * min(budget.stored, layers * components * (d + inner))


def test_private_factors_have_the_largest_rank_that_fits():
    budget = BankBudget(1, 100, 40, 1000, 40)
    assert size_private(budget) == (1, 9, 1), "9 · 100 + 9 + 1 numbers"
    assert size_private(BankBudget(1, 100, 40, 1000, 5)) == (1, 5, 1)
    assert size_private(budget, 4) == (1, 8, 1) and size_private(budget, 16) == (1, 9, 1)
    assert size_private(BankBudget(1, 100, 40, 50, 5)) is None


def test_affordable_steps():
    assert affordable(100, 10, 9, 99) == 10 and affordable(100, 10, 9, 4) == 4 and affordable(5, 10, 9, 4) == 0
