"""Pack ternary weights for the CPU kernel: two bits each, in blocks of 16 outputs by 8 inputs, 32 bytes long.

Bits 2f and 2f+1 of byte j of a block hold weight + 1 of output 8·(f // 2) + j // 4 and input 4·(f % 2) + j % 4: four
inputs of one output stand side by side, as the dot product instructions of CPUs read them. A tile is all blocks of 16
outputs. A primitive fills complete tiles, so that a layer reads its selected primitives in place, from the shared bank.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

OUTPUTS, INPUTS, BYTES = 16, 8, 32
_SHIFTS = (0, 2, 4, 6)
MOST_INPUTS = 2**24 // 127  # whose sum of products, each at most 127, stays below 2^24 and so is exact in float32


@dataclass
class BankTiles:
    """Tiles of a bank: A (n, r/16, ceil(d_in/8), 32) and B (n, ceil(d_out/16), r/8, 32), uint8."""

    A: Tensor
    B: Tensor
    d_in: int
    d_out: int
    _unpacked: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def rank(self) -> int:
        """Return r, the rank of a primitive."""
        return self.A.shape[1] * OUTPUTS

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Return A (n, d_in, r) and B (n, r, d_out) in float32, cached: sixteen times the size of the tiles."""
        if self._unpacked is None:
            self._unpacked = unpack(self.A, self.d_in, self.rank).float(), unpack(self.B, self.rank, self.d_out).float()
        return self._unpacked


@dataclass
class MatrixTiles:
    """Tiles of a dense matrix: A (1, ceil(d_out/16), ceil(d_in/8), 32), uint8."""

    A: Tensor
    d_in: int
    d_out: int
    _unpacked: Tensor | None = field(default=None, repr=False, compare=False)

    def unpacked(self) -> Tensor:
        """Return the matrix (d_in, d_out) in float32, cached."""
        if self._unpacked is None:
            self._unpacked = unpack(self.A, self.d_in, self.d_out)[0].float()
        return self._unpacked


@dataclass
class CpuProjection:
    """A ternary projection of (..., d_in) through a bank or a dense matrix; `scale`, `shift`, `bias` are float32.

    Through a bank: `selected` (k,) int64, `scale` (k·r,), `shift` (k·r,) or None. By a matrix: `scale` (d_out,).
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
        """Return A, B, selected, scale, shift and bias, the order of the kernel's operators."""
        B = self.tiles.B if isinstance(self.tiles, BankTiles) else None
        return self.tiles.A, B, self.selected, self.scale, self.shift, self.bias

    def fits(self) -> bool:
        """Return True if the kernel computes it exactly: integer sums below 2^24, groups of complete tiles."""
        return self.group % OUTPUTS == 0 and (self.group or self.tiles.d_in) <= MOST_INPUTS


def tiles(A: Tensor, B: Tensor) -> BankTiles:
    """Pack the ternary weights A (n, d_in, r) and B (n, r, d_out). Raises ValueError unless r is a multiple of 16."""
    n, d_in, rank = A.shape
    if B.shape[:2] != (n, rank):
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are not the two halves of one bank")
    if rank % OUTPUTS:
        raise ValueError(f"rank {rank} is not a multiple of {OUTPUTS}")
    return BankTiles(pack(A), pack(B), d_in, B.shape[2])


def matrix_tiles(matrix: Tensor) -> MatrixTiles:
    """Pack a ternary matrix (d_in, d_out)."""
    return MatrixTiles(pack(matrix[None]), *matrix.shape)


def pack(weights: Tensor) -> Tensor:
    """Pack ternary weights (n, d, m), d inputs and m outputs, into tiles (n, ceil(m/16), ceil(d/8), 32), uint8."""
    n, d, m = weights.shape
    stored = torch.nn.functional.pad(weights.to(torch.int8), (0, -m % OUTPUTS, 0, -d % INPUTS)) + 1
    stored = stored.to(torch.uint8).transpose(1, 2).reshape(n, -1, 2, 8, stored.shape[1] // INPUTS, 2, 4)
    fields = stored.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(-2)  # (n, tile, block, half · half, 32)
    fields = fields.reshape(n, stored.shape[1], stored.shape[4], 4, BYTES)
    packed = fields[..., 0, :].clone()
    for index in (1, 2, 3):
        packed |= fields[..., index, :] << _SHIFTS[index]
    return packed.contiguous()


def unpack(packed: Tensor, d: int, m: int) -> Tensor:
    """Return the ternary weights (n, d, m), int8, of the tiles that `pack` made."""
    n, outputs, inputs, _ = packed.shape
    fields = torch.stack([packed >> shift & 3 for shift in _SHIFTS], -2).to(torch.int8) - 1
    weights = fields.reshape(n, outputs, inputs, 2, 2, 8, 4).permute(0, 2, 4, 6, 1, 3, 5)
    return weights.reshape(n, inputs * INPUTS, outputs * OUTPUTS)[:, :d, :m].contiguous()
