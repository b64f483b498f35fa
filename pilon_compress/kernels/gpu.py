"""Ternary projections on a GPU: which kernels run, by shape and number of tokens.

    tokens        projection                                       feed-forward block
    up to 16      2 launches: dp4a                                 2 launches where A is small, otherwise 4 or 5
    up to 511     4 launches: quantise, tile, quantise, tile       projection by projection
    more          the same, tiles without groups by torch._int_mm on digits unpacked for the call

A matrix takes the first half of a projection's launches, and torch's for its scale.

The number of launches is what a small model waits for. The results are those of the float32 arithmetic that training
uses, whichever kernels run and whatever the batch: whole-number sums are exact, floats are added in one order, and
multiplications are never fused with additions (but torch.compile may do so where torch adds a bias: to the result of
torch._int_mm, or of a matrix). In the interpreter that is bit for bit. On a device exp and erf of silu and gelu are
others than torch's: about 1e-6 of an activation, or one step of its 8-bit code where that decides a rounding.

The operators `project`, `linear` and `ffn` of `pilon_gpu` are torch.library.triton_op: torch.compile and torch.export
see the kernels inside. The choice above is made while tracing, so compile few and many tokens apart.
"""

from typing import Any, NamedTuple

from torch import Tensor

from pilon_compress.errors import BadInput

try:
    import triton  # noqa: F401
except ImportError as missing:
    raise BadInput("the GPU kernels need triton: pip install 'pilon-compress[gpu]'") from missing

from pilon_compress.kernels import triton_launch
from pilon_compress.kernels.gpu_layout import GROUPS, BankWords, MatrixWords, matrix_words, words
from pilon_compress.kernels.triton_arithmetic import ACTIVATIONS

__all__ = [
    "BankWords",
    "MatrixWords",
    "Projection",
    "compose",
    "ffn",
    "launches",
    "matrix_words",
    "ternary_linear",
    "words",
]


class Projection(NamedTuple):
    """One projection of a layer: its bank, the primitives `selected` (k,) int64, and float32 vectors.

    `scale` and `shift` (k·r,), `bias` (d_out,).
    """

    words: BankWords
    selected: Tensor
    scale: Tensor
    shift: Tensor | None = None
    bias: Tensor | None = None


def compose(
    x: Tensor,
    bank_words: BankWords,
    selected: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    """`x` (..., d_in) -> (..., d_out) in the dtype of x. `group` numbers of x share a scale, one of GROUPS; 0: all."""
    _check(x, bank_words.d_in, group)
    return triton_launch.project(x, [bank_words.A, bank_words.B, selected, scale, shift, bias], group)


def ternary_linear(x: Tensor, matrix: MatrixWords, scale: Tensor, bias: Tensor | None = None, group: int = 0) -> Tensor:
    """A dense ternary projection: `x` (..., d_in) -> (..., d_out) in the dtype of x; `scale` and `bias` (d_out,)."""
    _check(x, matrix.d_in, group)
    return triton_launch.linear(x, matrix.A, matrix.selected, scale, bias, group)


def _check(x: Tensor, d_in: int, group: int) -> None:
    if group and group not in GROUPS:
        raise BadInput(f"group {group} is none of {', '.join(map(str, GROUPS))}, or 0")
    if x.shape[-1] != d_in:
        raise BadInput(f"x has {x.shape[-1]} numbers a token, the digits take {d_in}")


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
