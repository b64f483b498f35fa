"""Choose the parts of bands that share, each for itself: the options of a band are few of all sums of its parts."""

from collections.abc import Sequence

from pilon_compress.convert.allocate.options import Choice
from pilon_compress.elastic.knapsack import Limits, Menu, Option, Pick, choose_menus


def part_by_part(menus: Sequence[Menu], chosen: Sequence[Pick], limits: Limits) -> list[Pick] | None:
    """Choose again, with each part of the bands that share for itself: their options are few of all sums of parts.

    Neurons and shared roles of those bands stay. Returns None if nothing is within the limits.
    """
    if not any(_parts(pick) for pick in chosen):
        return list(chosen)
    groups, owners = list[Sequence[Option]](), list[tuple[int, str]]()
    fixed_stored = fixed_macs = 0
    for index, pick in enumerate(chosen):
        parts = _parts(pick)
        if not parts:
            alone = next(menu.options for menu in menus if menu.groups == pick.groups and pick.option in menu.options)
            groups.append(alone)
            owners.append((index, ""))
            continue
        used = _used(pick)
        fixed_stored += pick.option.stored - sum(one.stored for one in used)
        fixed_macs += pick.option.macs - sum(one.macs for one in used)
        groups += parts.values()
        owners += [(index, name) for name in parts]
    least = None if limits.least_macs is None else limits.least_macs - fixed_macs
    most = None if limits.macs is None else limits.macs - fixed_macs
    left = Limits(limits.stored - fixed_stored, most, least, limits.least_stored - fixed_stored)
    found = choose_menus([Menu((i,), group) for i, group in enumerate(groups)], left)
    return None if found is None else _rejoined(chosen, owners, [pick.option for pick in found])


def without(menus: Sequence[Menu], chosen: Sequence[Pick]) -> list[Menu]:
    """Return the menus without what bands that share were chosen with: their neurons and their shared roles."""
    gone = {(pick.groups, _shape(pick.option)) for pick in chosen if _parts(pick)}
    left = [
        Menu(menu.groups, [one for one in menu.options if (menu.groups, _shape(one)) not in gone]) for menu in menus
    ]
    return [menu for menu in left if menu.options]


def _shape(option: Option) -> tuple[int | None, tuple[str, ...]]:
    assert isinstance(option.what, Choice)
    return option.what.neurons, tuple(option.what.banks)


def _parts(pick: Pick) -> dict[str, list[Option]]:
    assert isinstance(pick.option.what, Choice)
    return pick.option.what.parts


def _used(pick: Pick) -> list[Option]:
    """Return the options of the parts that make up the option of a band."""
    choice = pick.option.what
    assert isinstance(choice, Choice)
    forms = {**choice.ranks, **choice.banks}
    return [next(one for one in options if one.what == forms[name]) for name, options in choice.parts.items()]


def _rejoined(chosen: Sequence[Pick], owners: Sequence[tuple[int, str]], options: Sequence[Option]) -> list[Pick]:
    """Put the options of parts together again, with what the bands' options have beside them."""
    found = list(chosen)
    for index, pick in enumerate(chosen):
        mine = {name: option for (owner, name), option in zip(owners, options, strict=True) if owner == index}
        if "" in mine:
            found[index] = pick._replace(option=mine[""])
            continue
        choice = pick.option.what
        assert isinstance(choice, Choice)
        before, after = _used(pick), list(mine.values())
        loss = pick.option.loss + sum(one.loss for one in after) - sum(one.loss for one in before)
        stored = pick.option.stored + sum(one.stored for one in after) - sum(one.stored for one in before)
        macs = pick.option.macs + sum(one.macs for one in after) - sum(one.macs for one in before)
        made = choice.with_parts({name: one.what for name, one in mine.items()})
        found[index] = pick._replace(option=Option(loss, stored, macs, made))
    return found
