"""Multiply with integer banks and matrices by the CPU kernels, as they are stored: nothing is unpacked in a call."""

from dataclasses import dataclass

from torch import Tensor

from pilon_compress.kernels import cpu, integers
from pilon_compress.kernels.integer_layout import IntegerTiles, tiles, words
from pilon_compress.nn.formats.integer import IntegerGrid
from pilon_compress.nn.formats.quantised import Products, QuantisedBank, Run
from pilon_compress.nn.formats.registry import Grid


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

    def linear(self, codes: Tensor, scale: Tensor, grid: Grid, bias: Tensor | None) -> Run:
        """Return the product with `codes` (1, d_in, d_out) of scales (1, groups, d_out), plus `bias` (d_out,)."""
        return integers.linear(_tiles(codes, scale, grid), None if bias is None else bias.detach())

    def packed(self, bank: QuantisedBank) -> PackedCodes:
        """Return the codes of `bank` in tiles."""
        grid = _integers(bank.A.grid)
        B = bank.B.codes().transpose(1, 2)
        _, rank, d_out = B.shape
        tiles_of_B = IntegerTiles(words(B, grid.bits), bank.B.scale, rank, d_out, grid.bits, grid.group)
        return PackedCodes(_tiles(bank.A.codes(), bank.A.scale, grid), tiles_of_B, bank.B.scale)

    def compose(self, packed: PackedCodes, selected: Tensor, weight: Tensor) -> Run:
        """Return the composition of the `selected` (k,) primitives with `weight` (k, r) or (k, 1)."""
        return integers.compose(packed.A, packed.B, packed.B_scale, selected, weight.detach())


def _tiles(codes: Tensor, scale: Tensor, grid: Grid) -> IntegerTiles:
    return tiles(codes, scale, _integers(grid).bits, grid.group)


def _integers(grid: Grid) -> IntegerGrid:
    assert isinstance(grid, IntegerGrid)
    return grid


IntegerGrid.products = IntegerProducts()
