"""Divide stored parameters by one ratio over all parts of the model; the first units get the remainder of rounding."""

from collections.abc import Sequence
from dataclasses import dataclass

from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site
from pilon_compress.nn.sizing import affordable


@dataclass(frozen=True)
class Unit:
    """A unit of a method's budget: it stores `fixed + count · price` parameters, with `count` at most `most`.

    A step is one rank, one basis vector, one neuron or one primitive, as the method has it.
    """

    sites: tuple[Site, ...]
    price: int
    fixed: int
    most: int

    @property
    def dense(self) -> int:
        """Return the parameters of the dense projections."""
        return sum(site.parameters for site in self.sites)


Share = tuple[Unit, int]


def deal(units: list[Unit], ratio: float, method: str) -> list[Share]:
    """Steps for every unit so that all of them together store at most `ratio` of the dense numbers.

    Every unit gets the steps that its own share pays for; what that leaves of the whole budget buys one more step,
    unit by unit, those first that have none yet. Raises BadInput where a unit would get none.
    """
    counts = [affordable(ratio * unit.dense, unit.fixed, unit.price, unit.most) for unit in units]
    left = ratio * sum(unit.dense for unit in units)
    left -= sum(unit.fixed + unit.price * count for unit, count in zip(units, counts, strict=True))
    for index in sorted(range(len(units)), key=lambda index: counts[index] > 0):
        unit = units[index]
        if counts[index] < unit.most and unit.price <= left:
            counts[index] += 1
            left -= unit.price
        if counts[index] < 1:
            raise BadInput(f"ratio {ratio:g} is too small for {method}: nothing would be left of {unit.sites[0].name}")
    return list(zip(units, counts, strict=True))


def bias_numbers(sites: Sequence[Site]) -> int:
    """Return the number of bias values of the sites."""
    return sum(site.d_out for site in sites if site.bias)


def groups(sites: Sequence[Site], layers_per_group: int) -> list[tuple[Site, ...]]:
    """Sites of one role and shape from `layers_per_group` neighbouring layers at a time, in layer order."""
    found: list[tuple[Site, ...]] = []
    alike: dict[tuple[str, int, int], list[Site]] = {}
    for site in sites:
        alike.setdefault((site.role, site.d_in, site.d_out), []).append(site)
    for members in alike.values():
        members.sort(key=lambda site: site.layer)
        found += [
            tuple(members[start : start + layers_per_group]) for start in range(0, len(members), layers_per_group)
        ]
    return found
