"""Integers of 8 bits or fewer in the place of weights: the formats int8, int4, int3 and int2.

    int8   -127 .. 127   a scale for every column: a component of a bank, an output of a dense matrix
    int4   -8 .. 7       two in a byte, and a scale for every 64 rows of a column
    int3   -4 .. 3       eight in three bytes, scales as for int4
    int2   -2 .. 1       four in a byte, likewise

Scales are bfloat16, of either sign.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from pilon_compress.nn.formats.quantised import Products, QuantisedFormat
from pilon_compress.nn.formats.registry import FORMATS, Grid

SHRINKS = torch.linspace(1.0, 0.5, 21).tolist()  # of the scale that nothing is clipped by
LEAST_SCALE = 1e-12


class IntegerGrid(Grid):
    """Integers of so many `bits`, where `group` rows of a column share a scale (0: all)."""

    bits: int
    products: Products | None = None

    def __init__(self, bits: int, group: int = 0) -> None:
        self.bits, self.group = bits, group
        self.stored_dtype = torch.int8 if bits == 8 else torch.uint8

    @property
    def range(self) -> tuple[int, int]:
        """Least and largest integer: few bits use all that there are, eight are symmetric."""
        return (-127, 127) if self.bits == 8 else (-(1 << self.bits - 1), (1 << self.bits - 1) - 1)

    def nearest(self, ratio: Tensor) -> Tensor:
        """Round `ratio` (any shape) to the nearest integers of the range."""
        return ratio.round().clamp(*self.range)

    def scales(self, weight: Tensor) -> Tensor:
        """Choose, of the scales that are tried, those with the least squared error."""
        low, high = self.range
        group = self.group or weight.shape[1]
        parts = functional.pad(weight, (0, 0, 0, -weight.shape[1] % group)).unflatten(1, (-1, group))
        top, bottom = parts.amax(2), parts.amin(2)
        largest = torch.where(top.abs() >= bottom.abs(), top, bottom)  # becomes the lowest integer: it reaches farthest
        bases = [largest.abs() / high] + ([largest / low] if -low > high else [])
        best, least = bases[0], torch.full_like(largest, torch.inf)
        for base in bases:
            for shrink in SHRINKS:
                scale = _stored(base * shrink)
                error = (parts - self.nearest(parts / scale[:, :, None]) * scale[:, :, None]).square().sum(2)
                best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return _stored(best).to(torch.bfloat16)

    def pack(self, codes: Tensor) -> Tensor:
        """Return integers (n, d, m) as (n, bytes): int8, or uint8 with their bits in a row, lowest first."""
        flat = codes.flatten(1)
        if self.bits == 8:
            return flat
        count, width, places = self._period()
        fields = (flat - self.range[0]).to(torch.uint8)
        fields = functional.pad(fields, (0, -flat.shape[1] % count)).unflatten(1, (-1, count)).unbind(-1)
        stored = [torch.zeros_like(fields[0]) for _ in range(width)]
        for field, (byte, shift) in zip(fields, places, strict=True):
            stored[byte] |= field << shift
            if shift + self.bits > 8:
                stored[byte + 1] |= field >> 8 - shift
        return torch.stack(stored, -1).flatten(1)[:, : self.size(*codes.shape[1:])[0]]

    def unpack(self, stored: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the integers (n, *shape) of the bytes `stored` (n, bytes)."""
        if self.bits == 8:
            return stored.unflatten(1, shape)
        _, width, places = self._period()
        columns = functional.pad(stored, (0, -stored.shape[1] % width)).unflatten(1, (-1, width)).unbind(-1)
        fields = []
        for byte, shift in places:
            field = columns[byte] >> shift
            if shift + self.bits > 8:
                field = field | columns[byte + 1] << 8 - shift
            fields.append(field & (1 << self.bits) - 1)
        numbers = torch.stack(fields, -1).flatten(1)[:, : math.prod(shape)].to(torch.int8) + self.range[0]
        return numbers.unflatten(1, shape)

    def refuse(self, stored: Tensor) -> str | None:
        """Return why the bytes are none of this grid; None if they are sound."""
        lowest = self.range[0]
        return f"holds numbers below {lowest}" if self.bits == 8 and bool((stored < lowest).any()) else None

    def _period(self) -> tuple[int, int, list[tuple[int, int]]]:
        """Return the values and bytes of a period, and the byte and bit at which each value begins."""
        whole = math.lcm(self.bits, 8)
        return whole // self.bits, whole // 8, [divmod(start, 8) for start in range(0, whole, self.bits)]


def _stored(scale: Tensor) -> Tensor:
    """Round scales to bfloat16, and away from zero."""
    scale = torch.where(scale.abs() < LEAST_SCALE, torch.full_like(scale, LEAST_SCALE), scale)
    return scale.to(torch.bfloat16).to(scale.dtype)


for _bits, _group in ((8, 0), (4, 64), (3, 64), (2, 64)):
    _scales = f"a scale for {_group} weights" if _group else "a scale per column"
    FORMATS.add(f"int{_bits}", QuantisedFormat(f"int{_bits}", IntegerGrid(_bits, _group), f"int{_bits}, {_scales}"))
