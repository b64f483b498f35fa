"""Compute ternary projections and feed-forward blocks on a GPU; shape and number of tokens decide which kernels run.

    tokens        projection                                       feed-forward block
    up to 16      2 launches: dp4a                                 2 launches where A is small, otherwise 4 or 5
    up to 511     4 launches: quantise, tile, quantise, tile       projection by projection
    more          the same, but tiles without groups by torch._int_mm on weights unpacked for the call

A dense matrix takes the first half of a projection's launches, and one of torch's for its scale.

Small models wait for launches, so few tokens take as few as possible. Results equal the float32 arithmetic of training,
whichever kernels run and whatever the batch: integer sums are exact, floats are added in one order, and multiplications
are never fused with additions (but torch.compile may fuse where torch adds a bias: to the result of torch._int_mm, or
of a matrix). In the interpreter they are equal bit for bit. On a device, exp and erf of silu and gelu differ from
torch's by about 1e-6 of an activation, or by one quantisation step where that decides a rounding.

The operators `project`, `linear` and `ffn` of `pilon_gpu` are torch.library.triton_op: torch.compile and torch.export
see the kernels inside. The kernels are chosen while tracing, so compile few and many tokens separately.
"""

from typing import Any, NamedTuple

from torch import Tensor

from pilon_compress.errors import BadInput

try:
    import triton  # noqa: F401
except ImportError as missing:
    raise BadInput("the GPU kernels need triton: pip install 'pilon-compress[gpu]'") from missing

from pilon_compress.kernels import triton_launch, triton_ops
from pilon_compress.kernels.gpu_layout import GROUPS, BankWords, MatrixWords, matrix_words, words
from pilon_compress.kernels.triton_arithmetic import ACTIVATIONS

__all__ = [
    "BankWords",
    "GpuProjection",
    "MatrixWords",
    "compose",
    "ffn",
    "launches",
    "matrix_words",
    "ternary_linear",
    "words",
]


class GpuProjection(NamedTuple):
    """A ternary projection through a bank: its packed weights, the primitives `selected` (k,) int64, float32 vectors.

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
    """Compute a projection through a bank: `x` (..., d_in) -> (..., d_out), in the dtype of x.

    `group` inputs share a scale: one of GROUPS, or 0 for all. Raises BadInput for another group or width of x.
    """
    _check(x, bank_words.d_in, group)
    return triton_ops.project(x, [bank_words.A, bank_words.B, selected, scale, shift, bias], group)


def ternary_linear(x: Tensor, matrix: MatrixWords, scale: Tensor, bias: Tensor | None = None, group: int = 0) -> Tensor:
    """Compute a projection by a dense ternary matrix: `x` (..., d_in) -> (..., d_out), in the dtype of x.

    `scale` and `bias` (d_out,); `group` as for `compose`.
    """
    _check(x, matrix.d_in, group)
    return triton_ops.linear(x, matrix.A, matrix.selected, scale, bias, group)


def _check(x: Tensor, d_in: int, group: int) -> None:
    if group and group not in GROUPS:
        raise BadInput(f"group must be 0, {', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]}, not {group}")
    if x.shape[-1] != d_in:
        raise BadInput(f"x has {x.shape[-1]} values per token, but the weights take {d_in}")


def ffn(
    x: Tensor, up: GpuProjection, down: GpuProjection, gate: GpuProjection | None = None, activation: str = "relu2"
) -> Tensor:
    """Compute down(act(up(x))), or down(act(gate(x)) · up(x)), of `x` (..., d): (..., d), in the dtype of x.

    The hidden units are quantised in groups of `triton_launch.GROUP`. `activation` is one of ACTIVATIONS; raises
    BadInput for another. Up to 16 tokens everything between x and the result stays float32.
    """
    if activation not in ACTIVATIONS:
        raise BadInput(f"activation {activation!r} does not exist; there are {', '.join(ACTIVATIONS)}")
    return triton_ops.ffn(x, _tensors(gate), _tensors(up), _tensors(down), ACTIVATIONS.index(activation))


def launches(tokens: int, gate: GpuProjection | None, up: GpuProjection) -> int:
    """Return the number of launches of `ffn`: 2, 4 or 5, or 0 where it goes projection by projection."""
    sides = (None if side is None else triton_launch.Operands(*_tensors(side)) for side in (gate, up))
    return triton_launch.launches(tokens, *sides)  # type: ignore[arg-type]


def _tensors(projection: GpuProjection | None) -> list[Any]:
    """Return A, B, selected, scale, shift and bias, the order of the operators; [] for None."""
    if projection is None:
        return []
    words, *rest = projection
    return [words.A, words.B, *rest]
