"""Choosing one option per group within a budget: the multiple-choice knapsack, solved by HiGHS.

    minimise  Σ loss · x    with  Σ x = 1 in every group,  Σ stored · x and Σ macs · x within their limits,  x ∈ {0, 1}

LEMS and ROCKET choose ranks by dynamic programming on a grid of the budget, which rounds costs up and leaves a part of
it unspent. Mixed-integer programming takes costs as they are, and both limits at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

GAP = 1e-4  # relative, by which the loss may exceed the least one
SMALL = 1e-2  # of the largest loss: below it HiGHS's absolute gap, 1e-6, is more than GAP


class Option(NamedTuple):
    """A form that one group may take: its loss, numbers stored and MACs per token. `what` is the caller's."""

    loss: float
    stored: int
    macs: int
    what: object = None


def choose(groups: Sequence[Sequence[Option]], stored: float, macs: float | None = None) -> list[Option] | None:
    """Choose one option of every group, of least total loss with at most `stored` numbers and, if given, `macs`.

    The loss is within GAP of the least one, and no other option of a single group lowers it within the limits.
    Deterministic. Returns None if no choice is within the limits.
    """
    limits = np.array([stored] if macs is None else [stored, macs], dtype=float)
    pruned = [pareto(group, macs is not None) for group in groups]
    best = [min(group, key=lambda option: option.loss) for group in pruned]
    if _within(best, limits):
        return best
    scale = max(option.loss for group in pruned for option in group)
    found = _solve(pruned, limits, scale)
    if found is None:
        return None
    total = sum(option.loss for option in found)
    if 0 < total < SMALL * scale:  # again in its own scale; an option that loses more than all of it is in no optimum
        cheap = [[option for option in group if option.loss <= total] for group in pruned]
        found = _solve(cheap, limits, total) or found
    return _spent(pruned, found, limits)


def pareto(options: Sequence[Option], by_macs: bool = False) -> list[Option]:
    """Return the options that no other one beats in loss, stored numbers and, if they count, MACs; smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.stored, one.loss, one.macs)):
        beaten = (k.loss <= option.loss and (not by_macs or k.macs <= option.macs) for k in kept)
        if not any(beaten):
            kept.append(option)
    return kept


def _costs(options: Sequence[Option], limits: np.ndarray) -> np.ndarray:
    """Stored numbers and, where limited, MACs of each option: (options, limits)."""
    return np.array([(option.stored, option.macs)[: len(limits)] for option in options], dtype=float)


def _within(chosen: Sequence[Option], limits: np.ndarray) -> bool:
    return bool((_costs(chosen, limits).sum(0) <= limits).all())


def _solve(groups: Sequence[Sequence[Option]], limits: np.ndarray, scale: float) -> list[Option] | None:
    """Choose by mixed-integer programming, with losses in units of `scale`; None if nothing is within the limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: it takes half a second
    from scipy.sparse import csr_array

    options = [option for group in groups for option in group]
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    members = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    costs = _costs(options, limits)
    losses = np.array([option.loss for option in options]) / (scale or 1.0)
    allowed = limits
    while True:
        found = milp(
            losses,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(members, 1, 1), LinearConstraint(costs.T, ub=allowed)],
            options={"mip_rel_gap": GAP},
        )
        if found.x is None:
            return None
        picked = np.zeros(len(groups), dtype=int)
        np.maximum.at(picked, owner, np.where(found.x > 0.5, np.arange(len(options)), 0))
        chosen = [options[index] for index in picked]
        if _within(chosen, limits):
            return chosen
        # HiGHS takes a limit to hold within its tolerance; numbers are counted
        allowed = allowed - np.maximum(costs[picked].sum(0) - limits, 0)


def _spent(groups: Sequence[Sequence[Option]], chosen: Sequence[Option], limits: np.ndarray) -> list[Option]:
    """Take the best single change while one lowers the loss within the limits: what the gap has left."""
    chosen = list(chosen)
    while True:
        changes = [
            (option.loss - current.loss, index, option)
            for index, (group, current) in enumerate(zip(groups, chosen, strict=True))
            for option in group
            if option.loss < current.loss and _within([*chosen[:index], option, *chosen[index + 1 :]], limits)
        ]
        if not changes:
            return chosen
        _, index, option = min(changes, key=lambda change: change[:2])
        chosen[index] = option
