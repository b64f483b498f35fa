"""Choosing one option per group within a budget: the multi-choice knapsack, solved exactly on a fine grid."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GRID = 4000  # steps of the budget; costs are rounded up to whole steps, so a choice never exceeds it
BISECTIONS = 40


class Option(NamedTuple):
    """Something that one group may be: its loss, numbers stored and MACs per token. `what` is the caller's."""

    loss: float
    stored: int
    macs: int
    what: object = None


def choose(groups: Sequence[Sequence[Option]], stored: float, macs: float | None = None) -> list[Option] | None:
    """One option of every group, of least total loss with at most `stored` numbers and, if given, `macs`.

    The stored budget is met by dynamic programming (Dudziński and Walukiewicz, 1987; as ROCKET uses it for ranks), the
    second one by a Lagrange multiplier on top. None if even the smallest options do not fit.
    """
    pruned = [pareto(group, macs is not None) for group in groups]
    free = _within(pruned, stored, 0.0)
    if free is None or macs is None or _macs(free) <= macs:
        return free
    low, high, best = 0.0, 1.0, None
    scale = max(option.loss for group in pruned for option in group) / max(1.0, macs) or 1e-30
    while high < 2**40 and best is None:
        found = _within(pruned, stored, high * scale)
        best = found if found is not None and _macs(found) <= macs else None
        high *= 4
    if best is None:
        return None
    high /= 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = _within(pruned, stored, middle * scale)
        if found is not None and _macs(found) <= macs:
            high, best = middle, found
        else:
            low = middle
    return best


def pareto(options: Sequence[Option], by_macs: bool = False) -> list[Option]:
    """The options that no other one beats in loss, stored numbers and, if they count, MACs; smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.stored, one.loss, one.macs)):
        beaten = (k.loss <= option.loss and (not by_macs or k.macs <= option.macs) for k in kept)
        if not any(beaten):
            kept.append(option)
    return kept


def _macs(chosen: Sequence[Option]) -> int:
    return sum(option.macs for option in chosen)


def _within(groups: Sequence[Sequence[Option]], stored: float, price: float) -> list[Option] | None:
    """Least Σ loss + price · MACs with Σ stored within the budget."""
    wished = [min(group, key=lambda one: one.loss + price * one.macs) for group in groups]
    if sum(option.stored for option in wished) <= stored:  # the grid's rounding must not cost what the budget allows
        return wished
    quantum = stored / GRID
    if quantum <= 0:
        return None
    best = np.zeros(GRID + 1)  # best[c]: least loss of the groups so far within c steps
    picks = []
    for group in groups:
        following = np.full(GRID + 1, np.inf)
        pick = np.full(GRID + 1, -1)
        for index, option in enumerate(group):
            steps = int(np.ceil(option.stored / quantum - 1e-9))
            if steps > GRID:
                continue
            value = best[: GRID + 1 - steps] + option.loss + price * option.macs
            better = value < following[steps:]
            following[steps:][better] = value[better]
            pick[steps:][better] = index
        best = following
        picks.append(pick)
    if not np.isfinite(best[GRID]):
        return None
    chosen, capacity = [], GRID
    for group, pick in zip(reversed(groups), reversed(picks), strict=True):
        option = group[int(pick[capacity])]
        chosen.append(option)
        capacity -= int(np.ceil(option.stored / quantum - 1e-9))
    return chosen[::-1]
