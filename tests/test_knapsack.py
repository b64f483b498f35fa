"""The knapsack against brute force: both limits exact, the loss within the stated gap, nothing left that fits."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilon_compress.elastic.knapsack import GAP, Option, choose, pareto

losses = st.one_of(st.integers(0, 100).map(float), st.floats(1e-12, 1e-6), st.floats(1e3, 1e6))
options = st.lists(st.builds(Option, losses, st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=5)
groups = st.lists(options, min_size=1, max_size=4)


def brute_force(groups, stored, macs=None):
    fits = [
        pick
        for pick in itertools.product(*groups)
        if sum(o.stored for o in pick) <= stored and (macs is None or sum(o.macs for o in pick) <= macs)
    ]
    return min((sum(o.loss for o in pick) for pick in fits), default=None)


@settings(max_examples=150, deadline=None)
@given(groups, st.integers(4, 200), st.none() | st.integers(4, 200), st.sampled_from([1, 1_000_003]))
def test_least_loss_within_both_limits(groups, stored, macs, unit):
    """Also in numbers as large as a model's, where a solver's tolerance is more than one of them."""
    groups = [[o._replace(stored=o.stored * unit, macs=o.macs * unit) for o in group] for group in groups]
    stored, macs = stored * unit, None if macs is None else macs * unit
    found, best = choose(groups, stored, macs), brute_force(groups, stored, macs)
    assert (found is None) == (best is None)
    if found is not None:
        assert all(option in group for option, group in zip(found, groups, strict=True))
        assert sum(option.stored for option in found) <= stored
        assert macs is None or sum(option.macs for option in found) <= macs
        assert best <= sum(option.loss for option in found) <= best * (1 + GAP) + 1e-15


def menus(layers, seed=0):
    """Options of layers as large as SmolLM2-135M's, whose losses differ as layers' do."""
    generator = np.random.default_rng(seed)
    dense = 3 * 576 * 1536
    found = []
    for scale in np.exp(generator.normal(0, 1, layers)):
        sizes = np.unique(generator.integers(dense // 20, dense, 24))
        falling = scale * np.exp(-generator.uniform(2, 6) * sizes / dense)
        found.append([Option(float(a), int(b), int(b)) for a, b in zip(falling, sizes, strict=True)])
    return found, dense * layers


@pytest.mark.parametrize("layers", [6, 30])
@pytest.mark.parametrize("limits", [(0.5, None), (0.8, 0.6), (0.25, None)], ids=str)
def test_the_budget_is_spent_to_within_the_smallest_step(layers, limits):
    found, dense = menus(layers)
    stored, macs = limits[0] * dense, None if limits[1] is None else limits[1] * dense
    chosen = choose(found, stored, macs)
    room = stored - sum(option.stored for option in chosen)
    room = room if macs is None else min(room, macs - sum(option.macs for option in chosen))
    steps = [
        option.stored - current.stored
        for group, current in zip(found, chosen, strict=True)
        for option in group
        if option.loss < current.loss
    ]
    assert 0 <= room < min(steps)
    assert room < 0.02 / layers * stored, "a grid of the budget left 0.3 to 1 % of it"
    assert choose(found, stored, macs) == chosen, "the same at every run"


def test_without_room_there_is_no_choice():
    assert choose([[Option(1.0, 10, 10)], [Option(0.0, 20, 5)]], 29) is None
    assert choose([[Option(1.0, 10, 10)], [Option(0.0, 20, 5)]], 30) is not None
    assert choose([[Option(1.0, 10, 10)]], 30, 9) is None


def test_pareto_keeps_what_nothing_beats():
    kept = pareto([Option(3, 1, 9), Option(2, 2, 9), Option(2.5, 3, 1), Option(1, 4, 9)])
    assert [option.loss for option in kept] == [3, 2, 1]
    assert len(pareto([Option(3, 1, 9), Option(2, 2, 9), Option(2.5, 3, 1)], by_macs=True)) == 3


def test_a_budget_for_the_best_of_everything_buys_it():
    groups = [[Option(1.0, 10, 10), Option(0.0, 1001, 1001)] for _ in range(3)]
    for macs in (None, 3003):
        found = choose(groups, 3003, macs)
        assert found is not None and [option.loss for option in found] == [0, 0, 0]
