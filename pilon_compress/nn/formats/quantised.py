"""Quantised formats: codes of a grid with their scales, for models that no longer change.

    QuantisedFormat("int4", IntegerGrid(4, 64), "int4, a scale for 64 numbers")

A matrix lies as (n, d, m): A as (n, d_in, r), B as (n, d_out, r), a dense matrix as (1, d_in, d_out). Layers compute in
floating point with the values that codes and scales stand for; what scales are to be is decided in
`convert.solve.gptq`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.formats.registry import Format, Grid
from pilon_compress.nn.part import Chosen, Matrix, Part


class Quantised(Part, nn.Module):
    """Matrices (n, d, m) as codes: `weight` (n, bytes), as the grid packs them, and `scale` (n, groups, m) bfloat16."""

    weight: Tensor
    scale: Tensor

    def __init__(self, n: int, d: int, m: int, grid: Grid) -> None:
        super().__init__()
        self.size, self.grid = (d, m), grid
        self.register_buffer("weight", torch.empty((n, grid.size(d, m)[0]), dtype=grid.stored_dtype))
        self.register_buffer("scale", torch.empty((n, grid.groups(d), m), dtype=torch.bfloat16))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (n, rows, columns) of the numbers that the codes stand for."""
        return len(self.weight), *self.size

    @torch.no_grad()
    def put(self, codes: Tensor, scale: Tensor) -> None:
        """Store codes (n, d, m) with their scales (n, groups, m)."""
        self.weight, self.scale = self.grid.pack(codes).contiguous(), scale.to(torch.bfloat16)

    def keep(self, used: Tensor) -> None:
        """Drop the matrices for which `used` (n,) is False."""
        self.weight, self.scale = self.weight[used].clone(), self.scale[used].clone()

    def values(self, selected: Tensor | None = None) -> Tensor:
        """Return the numbers as they count, (n, d, m) float32, of all matrices or of the `selected` (k,)."""
        stored, scale = self.weight, self.scale
        if selected is not None:
            stored, scale = stored.index_select(0, selected), scale.index_select(0, selected)
        return self.grid.unpack(stored, self.size).float() * self.grid.spread(scale.float(), self.size[0])

    def own_types(self) -> dict[str, torch.dtype]:
        """Return the tensors that keep their dtype when a model is cast: the scales."""
        return {"scale": torch.bfloat16}

    def refuse(self) -> str | None:
        """Return why codes or scales are damaged; None if they are sound."""
        if not (torch.isfinite(self.scale).all() and self.scale.all()):
            return "holds scales that are zero or not finite"
        return self.grid.refuse(self.weight)


class QuantisedBank(PrimitiveBank):
    """A bank of codes; layers compose it as any other, in floating point. B lies as (n, d_out, r)."""

    A: Quantised  # type: ignore[assignment]
    B: Quantised  # type: ignore[assignment]

    def __init__(self, d_in: int, d_out: int, n_primitives: int, rank: int, format: str, grid: Grid) -> None:
        nn.Module.__init__(self)  # A and B are no parameters
        self.format = format
        self.A = Quantised(n_primitives, d_in, rank, grid)
        self.B = Quantised(n_primitives, d_out, rank, grid)

    @property
    def d_out(self) -> int:
        """Return the width of the output."""
        return self.B.size[0]

    def primitives(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `selected` (k,) primitives, dequantised: A (k, d_in, r), B (k, r, d_out)."""
        return self.A.values(selected), self.B.values(selected).transpose(1, 2)

    def keep(self, used: Tensor) -> None:
        """Drop, in place, the primitives that the mask `used` (n,) leaves out."""
        self.A.keep(used)
        self.B.keep(used)

    def extra_repr(self) -> str:
        """Return the sizes and the number format, for `print`."""
        return f"{super().extra_repr()}, {self.format}"


class QuantisedLinear(Matrix, Quantised):
    """A dense matrix of codes; as `DenseLinear`."""

    unfolds = True

    def __init__(self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int], format: str, grid: Grid) -> None:
        super().__init__(1, d_in, d_out, grid)
        self.format = format
        self.in_features, self.out_features, self.host_shape = d_in, d_out, host_shape
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor, chosen: Chosen | None = None, inputs: bool = False) -> Tensor:
        """Compute `Matrix.forward`, with the numbers that the codes stand for."""
        matrix = self.matrix() if chosen is None else self.matrix().index_select(0 if inputs else 1, chosen.indices)
        return functional.linear(x, matrix.T.to(x.dtype), self.bias)

    def matrix(self) -> Tensor:
        """Return the weight (d_in, d_out), dequantised."""
        return self.values()[0]


class QuantisedFormat(Format):
    """A format of codes on a `grid`, which conversions round to."""

    final = True

    def __init__(self, name: str, grid: Grid, about: str) -> None:
        super().__init__(name)
        self.grid: Grid = grid
        self.bits, self.about = grid.bits, about

    def bank(self, d_in: int, d_out: int, n_primitives: int, rank: int) -> PrimitiveBank:
        """Return a bank of codes, not filled."""
        return QuantisedBank(d_in, d_out, n_primitives, rank, self.name, self.grid)

    def matrix(self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int], group: int) -> QuantisedLinear:
        """Return a matrix of codes, not filled."""
        return QuantisedLinear(d_in, d_out, bias, host_shape, self.name, self.grid)

    def matrix_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of codes and scales of a matrix."""
        return sum(self.grid.size(rows, columns))

    def fill_bank(self, bank: Any, side: str, values: Tensor, codes: Mapping[str, Tensor] | None) -> None:
        """Put codes and scales into the `side` (A or B) of a bank; `values` are not read."""
        assert codes is not None
        getattr(bank, side).put(codes["codes"], codes["scale"])

    def fill_matrix(self, matrix: Any, values: Tensor, codes: Mapping[str, Tensor] | None) -> None:
        """Put codes and scales into a matrix; `values` are not read."""
        assert codes is not None
        matrix.put(codes["codes"], codes["scale"])
