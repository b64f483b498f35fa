"""Whole numbers of 8 or 4 bits in the place of weights, for models that no longer change.

    int8   -127 .. 127   a scale for every column: a component of a bank, an output of a kept matrix
    int4   -8 .. 7       two in a byte, and a scale for every 64 rows of a column

A matrix lies as (n, d, m), scales running down its columns: A as (n, d_in, r), B as (n, d_out, r), a kept matrix as
(1, d_in, d_out). Scales are bfloat16, of either sign; what they are to be is decided in `convert.rounding`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pilon_compress.form.bank import PrimitiveBank
from pilon_compress.form.composed import NORM_EPS


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


KINDS = {"int8": Kind(8, 0), "int4": Kind(4, 64)}


def pack_integers(numbers: Tensor, kind: Kind) -> Tensor:
    """`numbers` (n, d, m) int8 as (n, bytes): int8, or uint8 with the earlier of two numbers in the low half."""
    flat = numbers.flatten(1)
    if kind.bits == 8:
        return flat
    flat = functional.pad(flat + 8, (0, flat.shape[1] % 2)).to(torch.uint8)
    return flat[:, ::2] | (flat[:, 1::2] << 4)


def unpack_integers(stored: Tensor, shape: tuple[int, int], kind: Kind) -> Tensor:
    """What `pack_integers` was given: (n, d, m) int8 for the `shape` (d, m)."""
    if kind.bits == 4:
        halves = torch.stack([stored & 15, stored >> 4], -1).flatten(1)
        stored = halves.to(torch.int8)[:, : shape[0] * shape[1]] - 8
    return stored.unflatten(1, shape)


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
        latent_scale: bool = False,
        latent_bias: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # A and B are no parameters
        self.A = Integers(n_primitives, d_in, rank, quantization)
        self.B = Integers(n_primitives, d_out, rank, quantization)
        self.latent_scale = nn.Parameter(torch.ones(rank)) if latent_scale else None
        self.latent_bias = nn.Parameter(torch.zeros(rank)) if latent_bias else None

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

    def __init__(
        self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int], quantization: str, norm: bool = False
    ) -> None:
        super().__init__(1, d_in, d_out, quantization)
        self.in_features, self.out_features, self.host_shape = d_in, d_out, host_shape
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.norm = nn.RMSNorm(d_in, eps=NORM_EPS) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., d_in) -> (..., d_out)."""
        return functional.linear(x if self.norm is None else self.norm(x), self.matrix().T.to(x.dtype), self.bias)

    def matrix(self) -> Tensor:
        """(d_in, d_out), as it counts in the forward pass."""
        return self.values()[0]
