"""Quantised formats: codes of a grid with their scales, for models that no longer change.

    QuantisedFormat("int4", IntegerGrid(4, 64), "int4, a scale for 64 numbers")

A matrix lies as (n, d, m): A as (n, d_in, r), B as (n, d_out, r), a dense matrix as (1, d_in, d_out). Layers compute in
floating point with the values that codes and scales stand for: by the kernels of the grid (`Products`), or in plain
torch, which restores the values in every call; so do layers that pass gradients on. What scales are to be is decided
in `convert.solve.gptq`.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pilon_compress.nn.bank import PrimitiveBank, Segment
from pilon_compress.nn.formats.registry import Format, Grid
from pilon_compress.nn.lazy import LazyValue
from pilon_compress.nn.part import Chosen, Matrix, Part

Run = Callable[[Tensor], Tensor]  # x (..., d_in) -> (..., d_out), in the dtype of x


class Products(ABC):
    """Kernels that multiply with the codes of a grid as they are stored; without them layers restore the numbers.

    A grid has one as `products`, set by a file that self-contained folders do not bring along.
    """

    @abstractmethod
    def name(self, device: str) -> str:
        """Name what computes on a device type: "torch" if nothing does but plain torch."""

    @abstractmethod
    def linear(self, codes: Tensor, scale: Tensor, grid: Grid, bias: Tensor | None) -> Run:
        """Return the product with `codes` (1, d_in, d_out) of scales (1, groups, d_out), plus `bias` (d_out,)."""

    @abstractmethod
    def packed(self, bank: "QuantisedBank") -> Any:
        """Return the codes of `bank` as `compose` takes them."""

    @abstractmethod
    def compose(self, packed: Any, selected: Tensor, weight: Tensor) -> Run:
        """Return the composition of the `selected` (k,) primitives with `weight` (k, r) or (k, 1)."""


def products(grid: Grid, x: Tensor) -> Products | None:
    """Return what multiplies `x` with codes of `grid`; None where that is plain torch."""
    found: Products | None = getattr(grid, "products", None)
    if found is None or (x.requires_grad and torch.is_grad_enabled()) or found.name(x.device.type) == "torch":
        return None
    return found


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

    def codes(self) -> Tensor:
        """Return the codes (n, d, m) of all matrices."""
        return self.grid.unpack(self.weight, self.size)

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
        self._packed: LazyValue[Any] = LazyValue()
        self._layers: defaultdict[int, LazyValue[Run]] = defaultdict(LazyValue)  # by the address of their weight

    @property
    def d_out(self) -> int:
        """Return the width of the output."""
        return self.B.size[0]

    def forward(
        self, x: Tensor, selected: Tensor, weight: Tensor, group: int = 0, *, segments: Sequence[Segment] = ()
    ) -> Tensor:
        """Compute `PrimitiveBank.forward`, by kernels where there are some and one composition is for all rows."""
        kernels = None if segments or weight.ndim > 2 else products(self.A.grid, x)
        if kernels is None:
            return super().forward(x, selected, weight, group, segments=segments)
        codes = (self.A.weight, self.A.scale, self.B.weight, self.B.scale)
        packed = self._packed.get(codes, partial(kernels.packed, self))
        make = partial(kernels.compose, packed, selected, weight)
        if torch.compiler.is_compiling():
            return make()(x)
        return self._layers[weight.data_ptr()].get((*codes, selected, weight), make)(x)

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
        self._product: LazyValue[Run] = LazyValue()

    def forward(self, x: Tensor, chosen: Chosen | None = None, inputs: bool = False) -> Tensor:
        """Compute `Matrix.forward`, with the numbers that the codes stand for.

        A kernel multiplies with the whole matrix, of which `chosen` columns are taken, or whose other rows get zeros.
        """
        kernels = products(self.grid, x)
        if kernels is not None:
            tensors = (self.weight, self.scale) if self.bias is None else (self.weight, self.scale, self.bias)
            product = self._product.get(tensors, lambda: kernels.linear(self.codes(), self.scale, self.grid, self.bias))
            if chosen is None:
                return product(x)
            if inputs:
                whole = x.new_zeros(*x.shape[:-1], self.in_features)
                return product(whole.index_copy_(-1, chosen.indices, x))
            return product(x).index_select(-1, chosen.indices)
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

    def kernel(self, device: str, d_in: int, group: int) -> str:
        """Name what computes a bank or matrix on a device type."""
        found: Products | None = getattr(self.grid, "products", None)
        return "torch" if found is None else found.name(device)

    def fill_bank(self, bank: Any, side: str, values: Tensor, codes: Mapping[str, Tensor] | None) -> None:
        """Put codes and scales into the `side` (A or B) of a bank; `values` are not read."""
        assert codes is not None
        getattr(bank, side).put(codes["codes"], codes["scale"])

    def fill_matrix(self, matrix: Any, values: Tensor, codes: Mapping[str, Tensor] | None) -> None:
        """Put codes and scales into a matrix; `values` are not read."""
        assert codes is not None
        matrix.put(codes["codes"], codes["scale"])
