"""Pack integers for the CPU kernels: words of 32 bits in tiles of 16 outputs, one stream from the first to the last.

A word holds the codes of consecutive inputs of one output, in two's complement, the first lowest: 4 codes of 8 bits, 8
of 4 bits, 10 of 3 bits (two bits of a word stay empty), 16 of 2 bits. A group of inputs that share a scale begins with
a word of its own; what is missing at its end is zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

OUTPUTS = 16
BITS = (2, 3, 4, 8)


@dataclass
class IntegerTiles:
    """Matrices of codes: words (n, tiles, groups, words of a group, 16) int32, scales (n, tiles, groups, 16) bfloat16.

    `group`: inputs that share a scale, 0 for all.
    """

    words: Tensor
    scales: Tensor
    d_in: int
    d_out: int
    bits: int
    group: int


@dataclass
class Int8Tiles:
    """8-bit rows for 8-bit activations: words (1, tiles, 1, ceil(d_in/4), 16), sums of rows (tiles·16,), int32."""

    words: Tensor
    sums: Tensor
    d_in: int
    d_out: int


def fields(bits: int) -> int:
    """Return the number of codes in a word."""
    return 32 // bits


def tiles(codes: Tensor, scale: Tensor, bits: int, group: int) -> IntegerTiles:
    """Pack `codes` (n, d, m) int8, d inputs and m outputs, with their scales (n, groups, m)."""
    _, d, m = codes.shape
    scales = pad(scale.to(torch.bfloat16), (0, -m % OUTPUTS)).unflatten(2, (-1, OUTPUTS)).transpose(1, 2)
    return IntegerTiles(words(codes, bits, group), scales.contiguous(), d, m, bits, group)


def words(codes: Tensor, bits: int, group: int = 0) -> Tensor:
    """Pack `codes` (n, d, m), int8, into words (n, tiles, groups, words of a group, 16), int32."""
    n, d, m = codes.shape
    each, inputs = fields(bits), group if 0 < group < d else d
    parts = pad(codes, (0, -m % OUTPUTS, 0, -d % inputs)).unflatten(1, (-1, inputs))
    parts = pad(parts, (0, 0, 0, -inputs % each)).unflatten(2, (-1, each)).unflatten(4, (-1, OUTPUTS))
    packed = torch.zeros((n, parts.shape[4], parts.shape[1], parts.shape[2], OUTPUTS), dtype=torch.int32)
    for field in range(each):  # parts: (n, groups, words, fields, tiles, 16)
        code = parts[:, :, :, field].permute(0, 3, 1, 2, 4).to(torch.int32)
        packed |= (code & (1 << bits) - 1) << bits * field
    return packed


def unpack(tiles: IntegerTiles) -> Tensor:
    """Return the codes (n, d, m), int8, of what `tiles` packed."""
    high = 32 - tiles.bits
    codes = torch.stack(
        [tiles.words << high - tiles.bits * field >> high for field in range(fields(tiles.bits))], 4
    )  # (n, tiles, groups, words, fields, 16)
    inputs = tiles.group if 0 < tiles.group < tiles.d_in else tiles.d_in
    rows = codes.permute(0, 2, 3, 4, 1, 5).flatten(2, 3)[:, :, :inputs].flatten(3)
    return rows.flatten(1, 2)[:, : tiles.d_in, : tiles.d_out].to(torch.int8)


def int8_tiles(weight: Tensor) -> Int8Tiles:
    """Pack the rows `weight` (d_out, d_in), int8."""
    d_out, d_in = weight.shape
    sums = pad(weight.sum(1, dtype=torch.int32), (0, -d_out % OUTPUTS))
    return Int8Tiles(words(weight.T[None], 8), sums, d_in, d_out)
