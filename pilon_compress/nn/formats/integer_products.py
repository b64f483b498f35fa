"""Multiply with integer banks and matrices by the CPU kernels, as they are stored: nothing is unpacked in a call."""

from dataclasses import dataclass

from torch import Tensor

from pilon_compress.kernels import cpu, integers
from pilon_compress.kernels.integer_layout import IntegerTiles, tiles, words
from pilon_compress.nn.formats.integer import IntegerGrid
from pilon_compress.nn.formats.quantised import Products, Quantised, QuantisedBank, QuantisedLinear, Run


@dataclass
class PackedCodes:
    """A bank in tiles; the scales of B (n, groups of outputs, r) run along its outputs."""

    A: IntegerTiles
    B: IntegerTiles
    B_scale: Tensor


class IntegerProducts(Products):
    """Products by `kernels.integers`."""

    def name(self, device: str) -> str:
        """Return the instruction set of the kernel on CPUs, "torch" elsewhere and where there is no kernel."""
        return cpu.isas()[0] if device == "cpu" and cpu.available() else "torch"

    def linear(self, matrix: QuantisedLinear) -> Run:
        """Return the product with `matrix`, its bias included."""
        return integers.linear(_tiles(matrix), None if matrix.bias is None else matrix.bias.detach())

    def packed(self, bank: QuantisedBank) -> PackedCodes:
        """Return the codes of `bank` in tiles."""
        B, grid = bank.B, _grid(bank.B)
        codes = grid.unpack(B.weight, B.size).transpose(1, 2)
        flat = IntegerTiles(words(codes, grid.bits), B.scale, codes.shape[1], codes.shape[2], grid.bits, grid.group)
        return PackedCodes(_tiles(bank.A), flat, B.scale)

    def compose(self, packed: PackedCodes, selected: Tensor, weight: Tensor) -> Run:
        """Return the composition of the `selected` (k,) primitives with `weight` (k, r) or (k, 1)."""
        return integers.compose(packed.A, packed.B, packed.B_scale, selected, weight.detach())


def _tiles(matrices: Quantised) -> IntegerTiles:
    grid = _grid(matrices)
    return tiles(grid.unpack(matrices.weight, matrices.size), matrices.scale, grid.bits, grid.group)


def _grid(matrices: Quantised) -> IntegerGrid:
    assert isinstance(matrices.grid, IntegerGrid)
    return matrices.grid


IntegerGrid.products = IntegerProducts()
