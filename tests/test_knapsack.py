"""The knapsack against brute force."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilon_compress.convert.allocate.knapsack import GRID, Option, choose, pareto

options = st.lists(
    st.builds(Option, st.integers(0, 100).map(float), st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=5
)
groups = st.lists(options, min_size=1, max_size=4)


def brute_force(groups, stored, macs=None):
    fits = [
        pick
        for pick in itertools.product(*groups)
        if sum(o.stored for o in pick) <= stored and (macs is None or sum(o.macs for o in pick) <= macs)
    ]
    return min((sum(o.loss for o in pick) for pick in fits), default=None)


@settings(max_examples=200, deadline=None)
@given(groups, st.integers(4, 200))
def test_least_loss_within_the_budget(groups, budget):
    stored = budget * GRID  # whole steps: what rounding up costs is no part of this
    scaled = [[option._replace(stored=option.stored * GRID) for option in group] for group in groups]
    if budget > GRID:
        return
    grid_exact = [[option._replace(stored=option.stored * (stored // GRID)) for option in group] for group in groups]
    found = choose(grid_exact, stored)
    best = brute_force(grid_exact, stored)
    assert (found is None) == (best is None)
    if found is not None:
        assert sum(option.loss for option in found) == pytest.approx(best)
        assert sum(option.stored for option in found) <= stored
    assert choose(scaled, 0.5) is None


@settings(max_examples=100, deadline=None)
@given(groups, st.integers(4, 200), st.integers(4, 200))
def test_macs_are_a_second_limit(groups, stored, macs):
    found = choose(groups, stored, macs)
    if found is not None:
        assert sum(option.stored for option in found) <= stored
        assert sum(option.macs for option in found) <= macs
    elif brute_force(groups, 0.9 * stored, macs) is not None:
        # a Lagrange multiplier finds the convex hull only: the cheapest choice of all must then break a limit
        assert brute_force(groups, stored) is not None


def test_without_room_there_is_no_choice():
    assert choose([[Option(1.0, 10, 10)], [Option(0.0, 20, 5)]], 29) is None
    assert choose([[Option(1.0, 10, 10)], [Option(0.0, 20, 5)]], 30.01) is not None
    assert choose([[Option(1.0, 10, 10)]], 30, 9) is None


def test_pareto_keeps_what_nothing_beats():
    kept = pareto([Option(3, 1, 9), Option(2, 2, 9), Option(2.5, 3, 1), Option(1, 4, 9)])
    assert [option.loss for option in kept] == [3, 2, 1]
    assert len(pareto([Option(3, 1, 9), Option(2, 2, 9), Option(2.5, 3, 1)], by_macs=True)) == 3


def test_a_budget_for_the_best_of_everything_buys_it():
    """However the sizes fall on the grid: at full size nothing is lost."""
    groups = [[Option(1.0, 10, 10), Option(0.0, 1001, 1001)] for _ in range(3)]
    for macs in (None, 3003):
        found = choose(groups, 3003, macs)
        assert found is not None and [option.loss for option in found] == [0, 0, 0]
