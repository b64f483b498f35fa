"""Choosing one option per group within a budget: the multiple-choice knapsack, solved by HiGHS.

    minimise  Σ loss · x    with  Σ x = 1 in every group,  Σ stored · x and Σ macs · x within their limits,  x ∈ {0, 1}

LEMS and ROCKET choose ranks by dynamic programming on a grid of the budget, which rounds costs up and leaves a part of
it unspent. Mixed-integer programming takes costs as they are, and both limits at once; an option may also cover
several groups, as a bank does that a band of layers shares.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

GAP = 1e-4  # relative, by which the loss may exceed the least one
MAC_STEPS = 64  # bins of MACs whose options do not beat each other, where MACs are to be spent
SPENT = 1 - 1e-6  # of the least MACs: HiGHS takes a limit to hold within its tolerance
SMALL = 1e-2  # of the largest loss: below it HiGHS's absolute gap, 1e-6, is more than GAP


class Option(NamedTuple):
    """A form that one group may take: its loss, numbers stored and MACs per token. `what` is the caller's."""

    loss: float
    stored: int
    macs: int
    what: object = None


@dataclass(frozen=True)
class Limits:
    """Numbers stored and MACs at most and, where they are to be spent, at least."""

    stored: float
    macs: float | None = None
    least_macs: float | None = None
    least_stored: float = 0.0

    def hold(self, options: Iterable[Option]) -> bool:
        """Return True if all of these together are within the limits."""
        chosen = list(options)
        stored, macs = sum(one.stored for one in chosen), sum(one.macs for one in chosen)
        within = stored <= self.stored and (self.macs is None or macs <= self.macs)
        spent = self.least_macs is None or macs >= SPENT * self.least_macs
        return within and spent and stored >= SPENT * self.least_stored


class Menu(NamedTuple):
    """Options, of which one at most is chosen, for all of these `groups` (indices) at once."""

    groups: tuple[int, ...]
    options: Sequence[Option]


class Pick(NamedTuple):
    """The option that was chosen for these groups."""

    groups: tuple[int, ...]
    option: Option


def choose(groups: Sequence[Sequence[Option]], stored: float, macs: float | None = None) -> list[Option] | None:
    """Choose one option of every group, of least total loss with at most `stored` numbers and, if given, `macs`.

    The loss is within GAP of the least one, and no other option of a single group lowers it within the limits.
    Deterministic. Returns None if no choice is within the limits.
    """
    found = choose_menus([Menu((index,), group) for index, group in enumerate(groups)], Limits(stored, macs))
    return None if found is None else [pick.option for pick in found]


def choose_menus(menus: Sequence[Menu], limits: Limits) -> list[Pick] | None:
    """Choose options so that every group is covered once, as `choose` does; in the order of their first groups."""
    count = None if limits.macs is None and limits.least_macs is None else limits.least_macs is None
    pruned = [Menu(menu.groups, _pruned(menu.options, count)) for menu in menus if menu.options]
    alone = all(len(menu.groups) == 1 for menu in pruned) and len({m.groups for m in pruned}) == len(pruned)
    best = [Pick(menu.groups, min(menu.options, key=lambda one: one.loss)) for menu in pruned]
    if alone and limits.hold(pick.option for pick in best):
        return sorted(best, key=lambda pick: pick.groups)
    scale = max(option.loss for menu in pruned for option in menu.options)
    found = _solve(pruned, limits, scale)
    if found is None:
        return None
    total = sum(pick.option.loss for pick in found)
    if 0 < total < SMALL * scale:  # again in its own scale; an option that loses more than all of it is in no optimum
        cheap = [Menu(menu.groups, [one for one in menu.options if one.loss <= total]) for menu in pruned]
        found = _solve([menu for menu in cheap if menu.options], limits, total) or found
    return _spent(pruned, found, limits)


def _pruned(options: Sequence[Option], by_macs: bool | None) -> list[Option]:
    """Drop options that others beat. by_macs: None: MACs do not count, True: fewer are better, False: any may be."""
    if by_macs is not False:
        return pareto(options, bool(by_macs))
    largest = max(option.macs for option in options)
    shelves = dict[int, list[Option]]()
    for option in options:
        shelves.setdefault(option.macs * MAC_STEPS // max(1, largest), []).append(option)
    return [option for shelf in shelves.values() for option in pareto(shelf)]


def pareto(options: Sequence[Option], by_macs: bool = False) -> list[Option]:
    """Return the options that no other one beats in loss, stored numbers and, if they count, MACs; smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.stored, one.loss, one.macs)):
        beaten = (k.loss <= option.loss and (not by_macs or k.macs <= option.macs) for k in kept)
        if not any(beaten):
            kept.append(option)
    return kept


def _solve(menus: Sequence[Menu], limits: Limits, scale: float) -> list[Pick] | None:
    """Choose by mixed-integer programming, with losses in units of `scale`; None if nothing is within the limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: it takes half a second
    from scipy.sparse import csr_array

    picks = [Pick(menu.groups, option) for menu in menus for option in menu.options]
    rows = [group for pick in picks for group in pick.groups]
    columns = [index for index, pick in enumerate(picks) for _ in pick.groups]
    members = csr_array((np.ones(len(rows)), (rows, columns)), shape=(max(rows) + 1, len(picks)))
    losses = np.array([pick.option.loss for pick in picks]) / (scale or 1.0)
    stored = np.array([pick.option.stored for pick in picks], dtype=float)
    macs = np.array([pick.option.macs for pick in picks], dtype=float)
    low = -np.inf if limits.least_macs is None else limits.least_macs
    allowed = np.array([limits.stored, np.inf if limits.macs is None else limits.macs])
    while True:
        found = milp(
            losses,
            integrality=np.ones(len(picks)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(members, 1, 1),
                LinearConstraint(stored[None], lb=limits.least_stored, ub=allowed[:1]),
                LinearConstraint(macs[None], lb=low, ub=allowed[1:]),
            ],
            options={"mip_rel_gap": GAP},
        )
        if found.x is None:
            return None
        chosen = sorted((picks[i] for i in np.flatnonzero(found.x > 0.5)), key=lambda pick: pick.groups)
        spent = np.array([[pick.option.stored, pick.option.macs] for pick in chosen], dtype=float).sum(0)
        if limits.hold(pick.option for pick in chosen):
            return chosen
        # HiGHS takes a limit to hold within its tolerance; numbers are counted
        allowed = allowed - np.maximum(spent - [limits.stored, allowed[1] if limits.macs is None else limits.macs], 0)


def _spent(menus: Sequence[Menu], chosen: Sequence[Pick], limits: Limits) -> list[Pick]:
    """Take the best single change while one lowers the loss within the limits: what the gap has left."""
    chosen = list(chosen)
    while True:
        changes = [
            (option.loss - pick.option.loss, index, option)
            for index, pick in enumerate(chosen)
            for menu in menus
            if menu.groups == pick.groups
            for option in menu.options
            if option.loss < pick.option.loss
            and limits.hold([option, *(one.option for one in chosen[:index]), *(o.option for o in chosen[index + 1 :])])
        ]
        if not changes:
            return chosen
        _, index, option = min(changes, key=lambda change: change[:2])
        chosen[index] = chosen[index]._replace(option=option)
