"""Measure the gain of a shared bank over factors of each layer's own, at equal stored numbers, by the joint fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pilon_compress.convert.allocate.budget import Sizing
from pilon_compress.convert.plan import BankPlan, trimmed
from pilon_compress.convert.sharing.joint_fit import fit_components
from pilon_compress.convert.sharing.objective import Band
from pilon_compress.convert.sharing.selection import component_worth
from pilon_compress.convert.solve.feed_forward import Dense, FeedForward
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.models.families import Site
from pilon_compress.nn.sizing import affordable

TYPICAL = 0.6  # power of the ratio: share of neurons that blocks keep where factors stand beside dropped neurons


@dataclass(frozen=True)
class Gain:
    """Loss of a shared bank over that of private factors of equal size, by the share of its components in use.

    curve (K,): entry s - 1 for layers that use their best s of K components
    """

    curve: Tensor

    def at(self, share: float) -> float:
        """Return the relative loss where every layer uses this share of the bank."""
        return float(self.curve[max(0, min(len(self.curve), round(share * len(self.curve))) - 1)])


def measure(
    dense: Dense, members: Sequence[Sizing], roles: Sequence[str], ratio: float, sweeps: int, seed: int
) -> dict[str, Gain]:
    """Fit one bank per role to the band `members`, at a size typical of `ratio`; returns gains by role.

    They change little with the numbers of neurons and components, so one size tells for all.
    """
    down = site_of(members[0], "down")
    wanted = down.d_in * ratio**TYPICAL
    neurons = min((count for count in members[0].counts if count), key=lambda count: abs(count - wanted), default=None)
    found, blocks = {}, [dense.read(member.layer) for member in members]
    for role in roles:
        targets = _targets(blocks, members, role, neurons)
        d_in, d_out = targets[0].weight.shape
        most = min(d_in, d_out)
        own = max(1, affordable(ratio * site_of(members[0], role).parameters, 0, d_in + d_out, most))
        found[role] = Gain(_curve(members, targets, role, neurons, own, sweeps, seed))
    return found


def _curve(
    members: Sequence[Sizing],
    targets: Sequence[Target],
    role: str,
    neurons: int | None,
    own: int,
    sweeps: int,
    seed: int,
) -> Tensor:
    sites = tuple(narrow(member, role, neurons) for member in members)
    count = own * len(members)
    band = Band(targets, BankPlan(0, role, sites, count, 1, count))
    private = sum(float(target.two_sided[2][own:].sum()) for target in targets) * band.scale
    if not private > 0:
        return torch.ones(count, dtype=torch.float64)
    x, loss = fit_components(band, seed, sweeps)
    tails = component_worth(band, x).double().sort(dim=1).values.cumsum(1).sum(0)  # without the weakest 1, 2, ...
    lost = torch.cat([tails.flip(0)[1:], tails.new_zeros(1)])
    return ((loss + lost) / private).clamp_min(0)


def _targets(blocks: Sequence[FeedForward], members: Sequence[Sizing], role: str, neurons: int | None) -> list[Target]:
    """Return the targets of one role in every layer of a band, in the unit of the allocation."""
    found = []
    for block, member in zip(blocks, members, strict=True):
        target = block.target(site_of(member, role), member.left(neurons))
        assert target.gradient is not None
        found.append(replace(target, gradient=member.scale * target.gradient, gradient_root=None))
    return found


def site_of(member: Sizing, role: str) -> Site:
    """Return the projection of that role."""
    return next(site for site in member.sites if site.role == role)


def narrow(member: Sizing, role: str, neurons: int | None) -> Site:
    """Return the projection of that role with so many neurons left."""
    site, down = site_of(member, role), site_of(member, "down")
    return site if neurons is None else trimmed(site, neurons, down.d_in)
