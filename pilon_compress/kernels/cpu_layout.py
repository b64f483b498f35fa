"""Digits packed for the kernel: two bits each, in blocks of 16 outputs by 8 inputs, 32 bytes long.

Bits 2f and 2f+1 of byte j of a block hold digit + 1 of output 8·(f // 2) + j // 4 and input 4·(f % 2) + j % 4: four
inputs of one output stand side by side, as the dot product instructions of CPUs want them. A tile is all blocks of 16
outputs. A primitive is whole tiles, so a layer reads the primitives it selects where the shared bank has them.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

OUTPUTS, INPUTS, BYTES = 16, 8, 32
_SHIFTS = (0, 2, 4, 6)
_WIDEST = 2**24 // 127  # inputs whose products with digits are sure to stay below 2^24


@dataclass
class BankTiles:
    """A bank: A (n, r/16, ceil(d_in/8), 32) and B (n, ceil(d_out/16), r/8, 32), uint8."""

    A: Tensor
    B: Tensor
    d_in: int
    d_out: int
    _digits: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def rank(self) -> int:
        return self.A.shape[1] * OUTPUTS

    def digits(self) -> tuple[Tensor, Tensor]:
        """A (n, d_in, r) and B (n, r, d_out) in float32: made once and kept, sixteen times the size of the tiles."""
        if self._digits is None:
            self._digits = unpack(self.A, self.d_in, self.rank).float(), unpack(self.B, self.rank, self.d_out).float()
        return self._digits


@dataclass
class MatrixTiles:
    """One matrix: A (1, ceil(d_out/16), ceil(d_in/8), 32), uint8."""

    A: Tensor
    d_in: int
    d_out: int
    _digits: Tensor | None = field(default=None, repr=False, compare=False)

    def digits(self) -> Tensor:
        """(d_in, d_out) in float32: made once and kept."""
        if self._digits is None:
            self._digits = unpack(self.A, self.d_in, self.d_out)[0].float()
        return self._digits


@dataclass
class Projection:
    """What a projection does to (..., d_in). `scale`, `shift` and `bias` are float32.

    Through a bank: `selected` (k,) int64, `scale` (k·r,), `shift` (k·r,) or None. A matrix: `scale` (d_out,).
    `group`: inputs that share a scale, a multiple of 16, or 0 for all. `norm` (d_in,): RMSNorm before the quantiser.
    """

    tiles: BankTiles | MatrixTiles
    scale: Tensor
    selected: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    group: int = 0
    norm: Tensor | None = None
    eps: float = 1e-6

    def tensors(self) -> tuple[Tensor | None, ...]:
        """As the kernel's operators take them."""
        B = self.tiles.B if isinstance(self.tiles, BankTiles) else None
        return self.tiles.A, B, self.selected, self.scale, self.shift, self.bias

    def fits(self) -> bool:
        """Whether the kernel computes it exactly: sums of codes below 2^24, groups that are whole tiles."""
        return self.group % OUTPUTS == 0 and (self.group or self.tiles.d_in) <= _WIDEST


def tiles(A: Tensor, B: Tensor) -> BankTiles:
    """Pack digits A (n, d_in, r) and B (n, r, d_out). Raises ValueError unless r is a multiple of 16."""
    n, d_in, rank = A.shape
    if B.shape[:2] != (n, rank):
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are not the two halves of one bank")
    if rank % OUTPUTS:
        raise ValueError(f"rank {rank} is not a multiple of {OUTPUTS}")
    return BankTiles(pack(A), pack(B), d_in, B.shape[2])


def matrix_tiles(matrix: Tensor) -> MatrixTiles:
    """Pack the digits (d_in, d_out) of a matrix."""
    return MatrixTiles(pack(matrix[None]), *matrix.shape)


def pack(digits: Tensor) -> Tensor:
    """Digits (n, d, m), d inputs and m outputs, as tiles (n, ceil(m/16), ceil(d/8), 32)."""
    n, d, m = digits.shape
    codes = torch.nn.functional.pad(digits.to(torch.int8), (0, -m % OUTPUTS, 0, -d % INPUTS)) + 1
    codes = codes.to(torch.uint8).transpose(1, 2).reshape(n, -1, 2, 8, codes.shape[1] // INPUTS, 2, 4)
    fields = codes.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(-2)  # (n, tile, block, ...) two halves each
    fields = fields.reshape(n, codes.shape[1], codes.shape[4], 4, BYTES)
    packed = fields[..., 0, :].clone()
    for index in (1, 2, 3):
        packed |= fields[..., index, :] << _SHIFTS[index]
    return packed.contiguous()


def unpack(packed: Tensor, d: int, m: int) -> Tensor:
    """What `pack` was given: digits (n, d, m), int8."""
    n, outputs, inputs, _ = packed.shape
    fields = torch.stack([packed >> shift & 3 for shift in _SHIFTS], -2).to(torch.int8) - 1
    digits = fields.reshape(n, outputs, inputs, 2, 2, 8, 4).permute(0, 2, 4, 6, 1, 3, 5)
    return digits.reshape(n, inputs * INPUTS, outputs * OUTPUTS)[:, :d, :m].contiguous()
