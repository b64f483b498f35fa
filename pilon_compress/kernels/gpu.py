"""Ternary projections on a GPU: which kernels run, by shape and number of tokens.

    tokens        projection                                       feed-forward block
    up to 16      2 launches: dp4a                                 2 launches where A is small, otherwise 4 or 5
    up to 511     4 launches: quantise, tile, quantise, tile       projection by projection
    more          the same, tiles without groups by torch._int_mm on digits unpacked for the call

The number of launches is what a small model waits for. The results are those of the float32 arithmetic that training
uses, whichever kernels run and whatever the batch: whole-number sums are exact, floats are added in one order, and
multiplications are never fused with additions (but torch.compile may do so where torch._int_mm's result gets its
bias). In the interpreter that is bit for bit. On a device exp and erf of silu and gelu are others than torch's:
about 1e-6 of an activation, or one step of its 8-bit code where that decides a rounding.

The operators `pilon_gpu::project` and `pilon_gpu::ffn` are torch.library.triton_op: torch.compile and torch.export see
the kernels inside. The choice above is made while tracing, so compile few and many tokens apart.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pilon_compress.errors import BadInput

try:
    import triton  # noqa: F401
except ImportError as missing:
    raise BadInput("the GPU kernels need triton: pip install 'pilon-compress[gpu]'") from missing

from pilon_compress.kernels import triton_launch
from pilon_compress.kernels.triton_arithmetic import ACTIVATIONS


class BankWords(NamedTuple):
    """A bank's digits in int32 words of 16: A (n, ceil(d_in / 16), r), B (n, r / 16, d_out); `d_in` tells the padding.

    A word holds numbers 16 i .. 16 i + 15 of one output; bits 8 j + 2 g hold number 4 g + j, as digit + 1.
    """

    A: Tensor
    B: Tensor
    d_in: int

    def to(self, device: torch.device | str) -> "BankWords":
        return BankWords(self.A.to(device), self.B.to(device), self.d_in)


class Projection(NamedTuple):
    """One projection of a layer: its bank, the primitives `selected` (k,) int64, and float32 vectors.

    `scale` and `shift` (k·r,), `bias` (d_out,).
    """

    words: BankWords
    selected: Tensor
    scale: Tensor
    shift: Tensor | None = None
    bias: Tensor | None = None


def words(A: Tensor, B: Tensor) -> BankWords:
    """Pack the digits A (n, d_in, r) and B (n, r, d_out), int8 in {-1, 0, 1}. `r` must be a multiple of 16."""
    rank = A.shape[-1]
    if rank % 16:
        raise BadInput(f"rank {rank} is not a multiple of 16, which the kernels need")
    padded = torch.nn.functional.pad(A, (0, 0, 0, -A.shape[1] % 16))
    return BankWords(_packed(padded), _packed(B), A.shape[1])


def _packed(digits: Tensor) -> Tensor:
    """(n, K, N) digits as (n, K / 16, N) words."""
    n, K, N = digits.shape
    fields = (digits.long() + 1).reshape(n, K // 16, 4, 4, N)  # number 4 g + j
    place = 2 * torch.arange(4, device=digits.device)[:, None] + 8 * torch.arange(4, device=digits.device)
    joined = (fields << place[None, None, :, :, None]).sum((2, 3))
    return torch.where(joined >= 2**31, joined - 2**32, joined).to(torch.int32)


def compose(
    x: Tensor,
    bank_words: BankWords,
    selected: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    """`x` (..., d_in) -> (..., d_out) in the dtype of x. `group` numbers of x share a scale, a power of two; 0: all."""
    if group and (group < 32 or group & (group - 1)):
        raise BadInput(f"group {group} is not a power of two from 32 on")
    if x.shape[-1] != bank_words.d_in:
        raise BadInput(f"x has {x.shape[-1]} numbers a token, the bank takes {bank_words.d_in}")
    return triton_launch.project(x, [bank_words.A, bank_words.B, selected, scale, shift, bias], group)


def ffn(
    x: Tensor, up: Projection, down: Projection, gate: Projection | None = None, activation: str = "relu2"
) -> Tensor:
    """`x` (..., d) -> (..., d): down(act(up(x))), or down(act(gate(x)) · up(x)); hidden units quantised in groups.

    As `cpu.ffn`; `activation` is one of ACTIVATIONS. Up to 16 tokens everything between x and the result stays float32.
    """
    if activation not in ACTIVATIONS:
        raise BadInput(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    return triton_launch.ffn(x, _parts(gate), _parts(up), _parts(down), ACTIVATIONS.index(activation))


def launches(tokens: int, gate: Projection | None, up: Projection) -> int:
    """How many launches `ffn` makes for so many tokens: 2, 4 or 5, or 0 where it goes projection by projection."""
    return triton_launch.launches(tokens, gate and triton_launch.Parts(*_parts(gate)), triton_launch.Parts(*_parts(up)))


def _parts(projection: Projection | None) -> list[Any]:
    """The projection as the operators take it."""
    if projection is None:
        return []
    packed, *rest = projection
    return [packed.A, packed.B, *rest]
