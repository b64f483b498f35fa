"""List the options of a band that shares banks: neurons, the bank of each role, and what stays each layer's own.

A shared bank costs MACs and saves numbers. Its loss is that of private factors of equal size times a gain that the
joint fit has measured (`gain`); so banks of every size stand beside ranks and plain matrices in one allocation.

Up-like roles share, attention stays each layer's own; so does `down`, since it takes up the errors of the layers before
it when layers are fitted one behind the other, and a shared one takes up next to nothing of them: sharing it lost where
the metric's loss promised a gain (docs/results/sharing.md). It is offered where a MAC ratio cannot be spent otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from pilon_compress.convert.allocate.budget import Sizing
from pilon_compress.convert.allocate.options import Choice, rank_options
from pilon_compress.convert.plan import down_of
from pilon_compress.convert.sharing.gain import Gain, measure, narrow, site_of
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.elastic.knapsack import Menu, Option
from pilon_compress.io.progress import track
from pilon_compress.models.families import Site
from pilon_compress.nn.sizing import BankSize

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a bank that one layer may select
PRIMITIVES = 32  # in a bank at least, if its rank is above 1: fewer leave a layer little to choose
RANKS = (16, 8, 4, 2, 1)
STORED_PRICES = np.logspace(-12, 1, 40)
MAC_PRICES = (0.0, 0.1, 0.3, 1.0, -0.1, -0.3, -0.6, -0.9)  # in units of the price of a stored number


class Parts(NamedTuple):
    """Forms that a part of a band may take: loss, numbers stored and MACs of each (m,), and what each is."""

    loss: np.ndarray
    stored: np.ndarray
    macs: np.ndarray
    what: list[Any]

    @classmethod
    def of(cls, options: Sequence[Option]) -> "Parts":
        """Arrange options as arrays."""
        loss, stored, macs, what = zip(*options, strict=True)
        return cls(np.array(loss), np.array(stored, float), np.array(macs, float), list(what))

    def cheapest(self, stored: float, macs: float) -> int:
        """Return the index of the form of least loss plus costs, at these prices per number and per MAC."""
        return int(np.argmin(self.loss + stored * self.stored + macs * self.macs))


@dataclass(frozen=True)
class Sharing:
    """The inputs of shared options: the dense model, the stored ratio, and the settings of bank fits.

    multiple: ranks are multiples of it
    """

    dense: Dense
    ratio: float
    sweeps: int
    seed: int = 0
    multiple: int | None = None

    def menus(self, sizings: Sequence[Sizing], bands: Sequence[Sequence[int]], down: bool = False) -> list[Menu]:
        """Return a menu for every band that can share: of several layers, alike in shape, each a whole block.

        down: the role `down` may share, too
        """
        places = {sizing.layer: place for place, sizing in enumerate(sizings) if sizing.kind == "ffn"}
        found = []
        for layers in track(bands, "fitting trial banks"):
            groups = tuple(places[layer] for layer in layers)
            members = [sizings[place] for place in groups]
            if can_share(members):
                found.append(Menu(groups, self.options(members, down)))
        return found

    def options(self, members: Sequence[Sizing], down: bool = False) -> list[Option]:
        """Return the options of a band whose up-like roles share banks, or, with `down`, one role or all of them."""
        roles = [site.role for site in members[0].sites]
        before = tuple(role for role in roles if role != "down")
        sets = (before, ("down",), (*before, "down")) if down else (before,)
        gains = measure(self.dense, members, roles if down else before, self.ratio, max(1, self.sweeps // 2), self.seed)
        found: list[Option] = []
        for neurons, shared in product(members[0].counts, sets):
            found += self._combined(members, neurons, shared, gains)
        return found

    def _combined(
        self, members: Sequence[Sizing], neurons: int | None, shared: Sequence[str], gains: dict[str, Gain]
    ) -> list[Option]:
        """The best sums of parts at many prices, with a bank for each of the roles `shared`."""
        banks = {role: _banks(members, role, neurons, gains[role], self.multiple) for role in shared}
        alone = {
            site.name: _alone(member, site, neurons, self.multiple)
            for member in members
            for site in member.sites
            if site.role not in shared
        }
        options = {**banks, **alone}
        if not all(options.values()):
            return []
        parts = [Parts.of(one) for one in options.values()]
        fixed = sum(narrow(m, site.role, neurons).d_out for m in members for site in m.sites if site.bias)
        lost = sum(m.scale * m.elimination.loss(neurons) for m in members if m.elimination and neurons is not None)
        highest = max(float(part.loss.max()) for part in parts) or 1.0
        found = {}
        for stored, macs in product(STORED_PRICES * highest, MAC_PRICES):
            picks = tuple(part.cheapest(stored, macs * stored) for part in parts)
            if picks not in found:
                forms = {name: part.what[index] for name, part, index in zip(options, parts, picks, strict=True)}
                found[picks] = Option(
                    lost + sum(float(part.loss[index]) for part, index in zip(parts, picks, strict=True)),
                    fixed + int(sum(part.stored[index] for part, index in zip(parts, picks, strict=True))),
                    int(sum(part.macs[index] for part, index in zip(parts, picks, strict=True))),
                    Choice(neurons, {}, dict.fromkeys(banks), options).with_parts(forms),  # type: ignore[arg-type]
                )
        return list(found.values())


def can_share(members: Sequence[Sizing]) -> bool:
    """Return True if these layers can share banks: several whole blocks, alike in shape, with options for factors."""
    shapes = {tuple((site.role, site.d_in, site.d_out, site.bias) for site in one.sites) for one in members}
    whole = all(down_of(one.sites) is not None and one.savings for one in members)
    return len(members) > 1 and whole and len(shapes) == 1 and all(one.counts == members[0].counts for one in members)


def _alone(member: Sizing, site: Site, neurons: int | None, multiple: int | None) -> list[Option]:
    """A projection of one layer's own, as a matrix or as factors, in the unit of the allocation."""
    small = narrow(member, site.role, neurons)
    options = rank_options(member.savings[site.name][neurons], small, multiple)
    return [one._replace(loss=member.scale * one.loss) for one in options]


def _banks(members: Sequence[Sizing], role: str, neurons: int | None, gain: Gain, multiple: int | None) -> list[Option]:
    """Banks of one role for all layers of a band: as many components as ranks of their own would be, or fewer."""
    layers, small = len(members), narrow(members[0], role, neurons)
    pair, full = small.d_in + small.d_out, small.d_in * small.d_out
    found = []
    for alone in zip(*(_alone(member, site_of(member, role), neurons, multiple) for member in members), strict=True):
        own, private = alone[0].what, sum(option.loss for option in alone)  # the same rank in every layer
        if not isinstance(own, int):
            continue
        rank = multiple or next(r for r in RANKS if r == 1 or own * layers % r == 0 and own * layers // r >= PRIMITIVES)
        if own * layers % rank:
            continue
        count = own * layers // rank
        for share in SHARES:
            selected = max(-(-count // layers), round(share * count))
            size = BankSize(count, rank, min(count, selected))
            inner = size.top_k * rank
            found.append(
                Option(
                    gain.at(size.top_k / count) * private,
                    count * rank * pair + layers * size.top_k * (rank + 1),
                    layers * min(inner * pair, full),
                    size,
                )
            )
    return found
