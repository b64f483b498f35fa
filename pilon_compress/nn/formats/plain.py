"""Floating-point numbers in the dtype of the model: the format `none`."""

from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.dense_linear import DenseLinear
from pilon_compress.nn.formats.registry import FORMATS, Format


class PlainFormat(Format):
    """Banks and matrices as parameters."""

    about = "floating point"

    def bank(self, d_in: int, d_out: int, n_primitives: int, rank: int) -> PrimitiveBank:
        """Return a bank of floats, uninitialised."""
        return PrimitiveBank(d_in, d_out, n_primitives, rank)

    def matrix(self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int], group: int) -> DenseLinear:
        """Return a dense matrix of floats, uninitialised."""
        return DenseLinear(d_in, d_out, bias, host_shape)

    def matrix_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of a matrix with `itemsize` bytes for each number."""
        return rows * columns * itemsize


FORMATS.add("none", PlainFormat("none"))
