"""Pack ternary weights for the GPU kernels: 16 in an int32 word. Uses torch alone, so that it imports without triton.

Word i of an output holds its inputs 16 i .. 16 i + 15; bits 8 j + 2 g and the next hold weight + 1 of input 4 g + j.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pilon_compress.errors import BadInput

MULTIPLE = 16  # ranks, and outputs of a dense matrix, must be multiples of it
GROUPS = (32, 64, 128, 256)  # inputs that may share a scale; tiles of larger groups exceed some GPUs' shared memory


class BankWords(NamedTuple):
    """Words of a bank: A (n, ceil(d_in / 16), r), B (n, r / 16, d_out), int32; `d_in` without padding."""

    A: Tensor
    B: Tensor
    d_in: int

    def to(self, device: torch.device | str) -> "BankWords":
        """Return the words on `device`."""
        return BankWords(self.A.to(device), self.B.to(device), self.d_in)


class MatrixWords(NamedTuple):
    """Words of a dense matrix as a bank of one primitive: A (1, ceil(d_in / 16), d_out), int32; `selected` is (0,)."""

    A: Tensor
    selected: Tensor
    d_in: int


def words(A: Tensor, B: Tensor) -> BankWords:
    """Pack A (n, d_in, r) and B (n, r, d_out), int8 in {-1, 0, 1}. Raises BadInput unless r is a multiple of 16."""
    rank = A.shape[-1]
    if rank % MULTIPLE:
        raise BadInput(f"rank {rank} is not a multiple of 16, which the kernels need")
    return BankWords(_packed(A), _packed(B), A.shape[1])


def matrix_words(matrix: Tensor) -> MatrixWords:
    """Pack a ternary matrix (d_in, d_out). Raises BadInput unless d_out is a multiple of 16."""
    d_in, d_out = matrix.shape
    if d_out % MULTIPLE:
        raise BadInput(f"{d_out} outputs are not a multiple of 16, which the kernels need")
    return MatrixWords(_packed(matrix[None]), torch.zeros(1, dtype=torch.int64, device=matrix.device), d_in)


def _packed(weights: Tensor) -> Tensor:
    """Pack ternary weights (n, K, N) into words (n, ceil(K / 16), N), int32."""
    padded = torch.nn.functional.pad(weights, (0, 0, 0, -weights.shape[1] % 16))
    n, K, N = padded.shape
    fields = (padded.long() + 1).reshape(n, K // 16, 4, 4, N)  # (n, word, g, j, output)
    place = 2 * torch.arange(4, device=weights.device)[:, None] + 8 * torch.arange(4, device=weights.device)
    joined = (fields << place[None, None, :, :, None]).sum((2, 3))
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)
