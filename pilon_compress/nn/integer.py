"""Whole numbers of 8 bits or fewer in the place of weights, for models that no longer change.

    int8   -127 .. 127   a scale for every column: a component of a bank, an output of a kept matrix
    int4   -8 .. 7       two in a byte, and a scale for every 64 rows of a column
    int3   -4 .. 3       eight in three bytes, scales as for int4
    int2   -2 .. 1       four in a byte, likewise

A matrix lies as (n, d, m), scales running down its columns: A as (n, d_in, r), B as (n, d_out, r), a kept matrix as
(1, d_in, d_out). Scales are bfloat16, of either sign; what they are to be is decided in `convert.solve.gptq`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pilon_compress.nn.bank import PrimitiveBank


@dataclass(frozen=True)
class Kind:
    """`bits` of a number, and how many rows share a scale: `group`, 0 for all."""

    bits: int
    group: int

    @property
    def range(self) -> tuple[int, int]:
        """Least and largest whole number: few bits use all that there are, eight are symmetric."""
        return (-127, 127) if self.bits == 8 else (-(1 << self.bits - 1), (1 << self.bits - 1) - 1)

    def groups(self, rows: int) -> int:
        """Scales per column."""
        return -(-rows // self.group) if self.group else 1

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Bytes of the numbers and bytes of the scales of one matrix."""
        return -(-rows * columns * self.bits // 8), 2 * self.groups(rows) * columns


KINDS = {"int8": Kind(8, 0), "int4": Kind(4, 64), "int3": Kind(3, 64), "int2": Kind(2, 64)}


def pack_integers(numbers: Tensor, kind: Kind) -> Tensor:
    """`numbers` (n, d, m) int8 as (n, bytes): int8, or uint8 with the numbers' bits in a row, lowest first."""
    flat = numbers.flatten(1)
    if kind.bits == 8:
        return flat
    count, width, places = _period(kind)
    fields = (flat - kind.range[0]).to(torch.uint8)
    fields = functional.pad(fields, (0, -flat.shape[1] % count)).unflatten(1, (-1, count)).unbind(-1)
    stored = [torch.zeros_like(fields[0]) for _ in range(width)]
    for field, (byte, shift) in zip(fields, places, strict=True):
        stored[byte] |= field << shift
        if shift + kind.bits > 8:
            stored[byte + 1] |= field >> 8 - shift
    return torch.stack(stored, -1).flatten(1)[:, : kind.size(*numbers.shape[1:])[0]]


def unpack_integers(stored: Tensor, shape: tuple[int, int], kind: Kind) -> Tensor:
    """What `pack_integers` was given: (n, d, m) int8 for the `shape` (d, m)."""
    if kind.bits == 8:
        return stored.unflatten(1, shape)
    _, width, places = _period(kind)
    columns = functional.pad(stored, (0, -stored.shape[1] % width)).unflatten(1, (-1, width)).unbind(-1)
    fields = []
    for byte, shift in places:
        field = columns[byte] >> shift
        if shift + kind.bits > 8:
            field = field | columns[byte + 1] << 8 - shift
        fields.append(field & (1 << kind.bits) - 1)
    numbers = torch.stack(fields, -1).flatten(1)[:, : math.prod(shape)].to(torch.int8) + kind.range[0]
    return numbers.unflatten(1, shape)


def _period(kind: Kind) -> tuple[int, int, list[tuple[int, int]]]:
    """So many numbers fill so many bytes; the byte and the bit at which each of them begins."""
    whole = math.lcm(kind.bits, 8)
    return whole // kind.bits, whole // 8, [divmod(start, 8) for start in range(0, whole, kind.bits)]


def spread(scale: Tensor, rows: int, kind: Kind) -> Tensor:
    """Scales (n, groups, m) for every row: (n, d, m)."""
    return scale.repeat_interleave(kind.group or rows, 1)[:, :rows]


class Integers(nn.Module):
    """Matrices (n, d, m) as whole numbers: `weight` (n, bytes) and `scale` (n, groups, m) bfloat16."""

    weight: Tensor
    scale: Tensor

    def __init__(self, n: int, d: int, m: int, quantization: str) -> None:
        super().__init__()
        self.size, self.quantization, self.kind = (d, m), quantization, KINDS[quantization]
        stored, dtype = self.kind.size(d, m)[0], torch.int8 if self.kind.bits == 8 else torch.uint8
        self.register_buffer("weight", torch.empty((n, stored), dtype=dtype))
        self.register_buffer("scale", torch.empty((n, self.kind.groups(d), m), dtype=torch.bfloat16))

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.weight), *self.size

    @torch.no_grad()
    def put(self, numbers: Tensor, scale: Tensor) -> None:
        """Store `numbers` (n, d, m) int8 with their scales (n, groups, m)."""
        self.weight, self.scale = pack_integers(numbers, self.kind).contiguous(), scale.to(torch.bfloat16)

    def keep(self, used: Tensor) -> None:
        """Drop the matrices for which `used` (n,) is False."""
        self.weight, self.scale = self.weight[used].clone(), self.scale[used].clone()

    def values(self, selected: Tensor | None = None) -> Tensor:
        """The numbers as they count, (n, d, m) float32, of all matrices or of the `selected` (k,)."""
        stored, scale = self.weight, self.scale
        if selected is not None:
            stored, scale = stored.index_select(0, selected), scale.index_select(0, selected)
        return unpack_integers(stored, self.size, self.kind).float() * spread(scale.float(), self.size[0], self.kind)

    def refuse(self) -> str | None:
        """What is wrong with what was read, if anything."""
        lowest = self.kind.range[0]
        if not (torch.isfinite(self.scale).all() and self.scale.all()):
            return "holds scales that are zero or not finite"
        if self.kind.bits == 8 and bool((self.weight < lowest).any()):
            return f"holds numbers below {lowest}"
        return None


class IntegerBank(PrimitiveBank):
    """A bank of whole numbers; layers compose it as any other, in floating point. B lies as (n, d_out, r)."""

    A: Integers  # type: ignore[assignment]
    B: Integers  # type: ignore[assignment]

    def __init__(
        self,
        d_in: int,
        d_out: int,
        n_primitives: int,
        rank: int,
        quantization: str,
    ) -> None:
        nn.Module.__init__(self)  # A and B are no parameters
        self.A = Integers(n_primitives, d_in, rank, quantization)
        self.B = Integers(n_primitives, d_out, rank, quantization)

    @property
    def d_out(self) -> int:
        return self.B.size[0]

    def primitives(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        return self.A.values(selected), self.B.values(selected).transpose(1, 2)

    def keep(self, used: Tensor) -> None:
        self.A.keep(used)
        self.B.keep(used)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.A.quantization}"


class IntegerLinear(Integers):
    """A kept matrix of whole numbers; as `KeptLinear`."""

    def __init__(self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int], quantization: str) -> None:
        super().__init__(1, d_in, d_out, quantization)
        self.in_features, self.out_features, self.host_shape = d_in, d_out, host_shape
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., d_in) -> (..., d_out)."""
        return functional.linear(x, self.matrix().T.to(x.dtype), self.bias)

    def matrix(self) -> Tensor:
        """(d_in, d_out), as it counts in the forward pass."""
        return self.values()[0]
