"""Compute products with integers on the CPU: matrices and banks of 8, 4, 3 or 2 bits, and 8-bit rows.

    linear, compose   float activations, codes with a scale for each group of inputs: nothing is rounded, and the sums
                      are float32
    int8              8-bit activations, 8-bit rows: exact sums of integers, equal to `reference.int8_linear`

Each returns a function for many calls, with the tensors registered in the kernel (`cpu.Prepared`). `cpu.available` says
whether there is a kernel; without one layers compute in plain torch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from pilon_compress.kernels.cpu import Prepared
from pilon_compress.kernels.integer_layout import OUTPUTS, Int8Tiles, IntegerTiles

Run = Callable[[Tensor], Tensor]  # x (..., d_in) -> (..., d_out), in the dtype of x


def linear(tiles: IntegerTiles, bias: Tensor | None = None) -> Run:
    """Return the product with the one matrix of `tiles`, plus `bias` (d_out,)."""
    sizes = (tiles.d_out, tiles.bits, tiles.group)

    def product(x: Tensor, added: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.pilon.integer_linear(x, tiles.words, tiles.scales, added, *sizes)
        return y

    return _with_bias(
        product,
        bias,
        lambda added: torch.ops.pilon.prepare_integer_linear(tiles.words, tiles.scales, added, tiles.d_in, *sizes),
    )


def int8(tiles: Int8Tiles, scale: Tensor, bias: Tensor | None = None) -> Run:
    """Return the product of `reference.int8_linear` with the rows of `tiles`; `scale` and `bias` (d_out,)."""
    parts = (tiles.words, tiles.sums, scale)

    def product(x: Tensor, added: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.pilon.int8_linear(x, *parts, added, tiles.d_out)
        return y

    return _with_bias(
        product, bias, lambda added: torch.ops.pilon.prepare_int8_linear(*parts, added, tiles.d_in, tiles.d_out)
    )


def compose(A: IntegerTiles, B: IntegerTiles, B_scale: Tensor, selected: Tensor, weight: Tensor) -> Run:
    """Return the composition of the `selected` (k,) primitives of a bank with `weight` (k, r) or (k, 1).

    A: matrices (d_in, r)   B: matrices (r, d_out), whose scales `B_scale` (n, groups of outputs, r) run along outputs
    """
    components = A.d_out + -A.d_out % OUTPUTS
    wide = pad(weight.float().expand(len(selected), A.d_out), (0, components - A.d_out)).contiguous()
    parts = (A.words, A.scales, B.words, B_scale.contiguous(), selected.contiguous(), wide)

    def product(x: Tensor, added: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.pilon.integer_compose(x, *parts, B.d_out, A.bits, A.group)
        return y

    return _with_bias(
        product, None, lambda _: torch.ops.pilon.prepare_integer_compose(*parts, A.d_in, B.d_out, A.bits, A.group)
    )


def _with_bias(
    product: Callable[[Tensor, Tensor | None], Tensor], bias: Tensor | None, prepare: Callable[[Tensor | None], int]
) -> Run:
    """Return `product` plus `bias` in the dtype of x: float32 adds inside, narrower dtypes after rounding, as torch."""

    def plain(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype == torch.float32:
                return product(x.contiguous(), None if bias is None else bias.float())
            y = product(x.float().contiguous(), None).to(x.dtype)
            return y if bias is None else y + bias.to(x.dtype)

    return plain if torch.compiler.is_compiling() else Prepared(prepare(None if bias is None else bias.float()), plain)
