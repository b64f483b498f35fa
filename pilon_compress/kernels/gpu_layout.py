"""Digits packed for a GPU: int32 words of 16. Made by torch alone, so that it takes no triton to say what fits.

A word holds numbers 16 i .. 16 i + 15 of one output; bits 8 j + 2 g hold number 4 g + j, as digit + 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pilon_compress.errors import BadInput

MULTIPLE = 16  # what ranks, and outputs of a matrix, must be multiples of
GROUPS = (32, 64, 128, 256)  # of inputs that may share a scale: tiles of larger ones have no room on some GPUs


class BankWords(NamedTuple):
    """A bank: A (n, ceil(d_in / 16), r), B (n, r / 16, d_out); `d_in` tells the padding."""

    A: Tensor
    B: Tensor
    d_in: int

    def to(self, device: torch.device | str) -> "BankWords":
        return BankWords(self.A.to(device), self.B.to(device), self.d_in)


class MatrixWords(NamedTuple):
    """One matrix, as the A of a bank whose only primitive is `selected`: A (1, ceil(d_in / 16), d_out)."""

    A: Tensor
    selected: Tensor
    d_in: int


def words(A: Tensor, B: Tensor) -> BankWords:
    """Pack the digits A (n, d_in, r) and B (n, r, d_out), int8 in {-1, 0, 1}. `r` must be a multiple of 16."""
    rank = A.shape[-1]
    if rank % MULTIPLE:
        raise BadInput(f"rank {rank} is not a multiple of 16, which the kernels need")
    return BankWords(_packed(A), _packed(B), A.shape[1])


def matrix_words(matrix: Tensor) -> MatrixWords:
    """Pack the digits (d_in, d_out) of a matrix. `d_out` must be a multiple of 16."""
    d_in, d_out = matrix.shape
    if d_out % MULTIPLE:
        raise BadInput(f"{d_out} outputs are not a multiple of 16, which the kernels need")
    return MatrixWords(_packed(matrix[None]), torch.zeros(1, dtype=torch.int64, device=matrix.device), d_in)


def _packed(digits: Tensor) -> Tensor:
    """(n, K, N) digits as (n, ceil(K / 16), N) words."""
    padded = torch.nn.functional.pad(digits, (0, 0, 0, -digits.shape[1] % 16))
    n, K, N = padded.shape
    fields = (padded.long() + 1).reshape(n, K // 16, 4, 4, N)  # number 4 g + j
    place = 2 * torch.arange(4, device=digits.device)[:, None] + 8 * torch.arange(4, device=digits.device)
    joined = (fields << place[None, None, :, :, None]).sum((2, 3))
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)
