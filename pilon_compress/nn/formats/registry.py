"""Describe number formats, and register all of them by name.

    FORMATS.add("int4", QuantisedFormat("int4", IntegerGrid(bits=4, group=64), "int4, a scale for 64 numbers"))

The name stands in layouts (`quantization` of banks and matrices in config.json) and, if the format has a `grid`, is a
value of the recipe's `form.bank_dtype`. Everything that differs between formats is here or in a format's modules.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pilon_compress.errors import BadInput
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.plugins import Registry

if TYPE_CHECKING:
    from pilon_compress.nn.composed_linear import ComposedLinear


class Grid(ABC):
    """The numbers that a quantised format has: codes, which are rounded to, and scales, which codes are multiplied by.

    A matrix lies as (n, d, m), scales running down its columns. `group`: rows that share a scale, 0 for all.
    """

    bits: float
    group: int = 0
    code_dtype: torch.dtype = torch.int8
    """Dtype that holds codes exactly."""
    stored_dtype: torch.dtype = torch.uint8
    """Dtype that codes are saved in, after `pack`."""

    @abstractmethod
    def scales(self, weight: Tensor) -> Tensor:
        """Choose scales (n, groups, m), in bfloat16 and never zero, for `weight` (n, d, m)."""

    @abstractmethod
    def nearest(self, ratio: Tensor) -> Tensor:
        """Round weights over their scales to the nearest codes, elementwise, in the dtype of `ratio`."""

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes (n, d, m) as they are stored, (n, bytes)."""
        return codes.flatten(1).view(self.stored_dtype)

    def unpack(self, stored: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return what `pack` was given, for the `shape` (d, m)."""
        return stored.view(self.code_dtype).unflatten(1, shape)

    def refuse(self, stored: Tensor) -> str | None:
        """Say why packed codes that were read are none; None if they are sound."""
        return None

    def groups(self, rows: int) -> int:
        """Scales per column."""
        return -(-rows // self.group) if self.group else 1

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Bytes of the codes and bytes of the scales of one matrix."""
        return -int(-rows * columns * self.bits // 8), 2 * self.groups(rows) * columns

    def spread(self, scale: Tensor, rows: int) -> Tensor:
        """Repeat scales (n, groups, m) for every row: (n, rows, m)."""
        return scale.repeat_interleave(self.group or rows, 1)[:, :rows]


class Format(ABC):
    """A number format.

    bits: of a weight, scales aside; None: those of the model's dtype   about: a phrase for model cards
    grid: numbers that a conversion rounds to; None if conversions do not make this format
    final: its modules no longer change
    packs: the format in training whose modules the `pack_...` methods turn into modules of this one; None: of none
    exact_compositions: compositions of its banks stay in float32
    travels: its source file is enough to compute, so that a self-contained folder can bring it along
    multiple: components of a layer and outputs are computed as multiples of it, with zeros that are not stored
    """

    bits: float | None = None
    about: str = ""
    grid: Grid | None = None
    final: bool = False
    packs: str | None = None
    exact_compositions: bool = False
    travels: bool = True
    multiple: int = 1

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def bank(self, d_in: int, d_out: int, n_primitives: int, rank: int) -> PrimitiveBank:
        """Make an uninitialised bank."""

    @abstractmethod
    def matrix(self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int], group: int) -> nn.Module:
        """Make an uninitialised matrix: a module that is a `Matrix`."""

    @abstractmethod
    def matrix_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes of one matrix, or of one side of one primitive; `itemsize`: bytes of a number of the model's dtype."""

    def computed(self, size: int) -> int:
        """Return the number of a layer's components, or of outputs, that `size` is computed as."""
        return size + -size % self.multiple

    def kernel(self, device: str, d_in: int, group: int) -> str:
        """Name what computes a bank or matrix of this format on a device type, and the reason if it is slow."""
        return "torch"

    def matrix_scales(self, d_out: int) -> int:
        """Count the float32 scales that are stored, as numbers of their own, with a dense matrix."""
        return 0

    def fill_bank(self, bank: Any, side: str, values: Tensor, codes: Mapping[str, Tensor] | None) -> None:
        """Put a conversion's primitives into `bank.A` or `bank.B` (`side`).

        values: (n, d_in, r) or (n, r, d_out), of the model's dtype   codes: "codes" and "scale" if they were rounded
        """
        getattr(bank, side).copy_(values)

    def fill_matrix(self, matrix: Any, values: Tensor, codes: Mapping[str, Tensor] | None) -> None:
        """Put a conversion's `values` (d_in, d_out) into a matrix; `codes` as in `fill_bank`."""
        matrix.weight.copy_(values.T)

    def pack_bank(self, bank: Any) -> PrimitiveBank:
        """Return the bank of this format that computes what `bank` computes, a bank of the format `packs`."""
        raise TypeError(f"{self.name} packs nothing")

    def pack_projection(self, layer: Any, bank: Any) -> "ComposedLinear":
        """Return the projection that composes from the packed `bank` what `layer` composes from its own."""
        raise TypeError(f"{self.name} packs nothing")

    def pack_matrix(self, matrix: Any) -> nn.Module:
        """Return the matrix of this format that computes what `matrix` computes."""
        raise TypeError(f"{self.name} packs nothing")


FORMATS: Registry[Format] = Registry("number format", "pilon_compress.nn.formats")


def grids() -> dict[str, Grid]:
    """The formats that a conversion can round to, by name."""
    return {name: one.grid for name, one in FORMATS.items() if one.grid is not None}


def conversion_format(name: str) -> str | None:
    """Return the number format that `form.bank_dtype` names, None for auto. Raises BadInput for any other name."""
    if name != "auto" and name not in grids():
        raise BadInput(f"form.bank_dtype {name!r} is none of auto, {', '.join(grids())}")
    return None if name == "auto" else name


def grid_of(name: str) -> Grid:
    """Return the grid of a format. Raises BadInput for a format that conversions do not make."""
    grid = FORMATS[name].grid
    if grid is None:
        raise BadInput(f"a conversion does not make {name}; it makes {', '.join(grids())}")
    return grid
