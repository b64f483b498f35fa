"""The arithmetic of ternary projections in plain torch: what kernels must reproduce, and what runs without them.

Products of codes (at most 127) and digits are whole numbers below 2^24, so float32 matrix products are exact in any
order. Everything else is one float32 operation after another, in the order written here.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 127  # symmetric: -128 is not used
LEAST = 1e-20  # magnitude that zeros are taken to have

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def quantise(x: Tensor, group: int = 0, rounding: Callable[[Tensor], Tensor] = torch.round) -> tuple[Tensor, Tensor]:
    """Codes (..., d) of `x` (..., d), whole numbers in float32, and their scales: (..., 1), or (..., ceil(d / group)).

    The scale is a token's own largest magnitude over 127, so that neither other tokens nor the batch matter.
    `rounding`: another one has gradients (`nn.ternary_quantizer.straight`).
    """
    x = x.float()
    d = x.shape[-1]
    parts = grouped(x, group or d)
    largest = parts.detach().abs().amax(-1, keepdim=True).clamp_min(LEAST)
    codes = rounding(parts * (largest.reciprocal() * LEVELS))  # what LEVELS / largest is in torch
    return codes.flatten(-2)[..., :d], largest[..., 0] / LEVELS


def grouped(x: Tensor, group: int) -> Tensor:
    """(..., d) as (..., ceil(d / group), group), the last one filled up with zeros."""
    return functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def product(codes: Tensor, scales: Tensor, matrix: Tensor, group: int = 0) -> Tensor:
    """`codes` (..., d) times the digits `matrix` (d, m), scaled: (..., m). Groups are added up in their order."""
    if scales.shape[-1] == 1:
        return (codes @ matrix) * scales
    parts = zip(codes.split(group, -1), matrix.split(group, 0), scales.unbind(-1), strict=True)
    total: Tensor | None = None
    for part, rows, scale in parts:
        term = (part @ rows) * scale[..., None]
        total = term if total is None else total + term
    assert total is not None
    return total


def compose(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    selected: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    """A composed projection: `x` (..., d_in) -> (..., d_out) float32.

    Digits A (n, d_in, r) and B (n, r, d_out) of the bank; `selected` (k,); `scale`, `shift` (k·r,); `bias` (d_out,).
    """
    A, B = A[selected].float(), B[selected].float()
    u = product(*quantise(x, group), A.permute(1, 0, 2).flatten(1), group) * scale
    if shift is not None:
        u = u + shift
    y = product(*quantise(u), B.flatten(0, 1))
    return y if bias is None else y + bias


def ternary_linear(x: Tensor, matrix: Tensor, scale: Tensor, bias: Tensor | None = None, group: int = 0) -> Tensor:
    """A dense ternary projection: digits `matrix` (d_in, d_out), `scale` (d_out,), `bias` (d_out,) -> float32."""
    y = product(*quantise(x, group), matrix.float(), group) * scale
    return y if bias is None else y + bias


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` (..., d_in) in 8 bits per token times int8 `weight` (d_out, d_in); `scale` (d_out,) -> (..., d_out) float32.

    These sums pass 2^24, so they are made of integers and rounded to float32 once.
    """
    codes, scales = quantise(x)
    whole = whole_product(codes.reshape(-1, x.shape[-1]).to(torch.int8), weight, x.device.type != "cpu")
    y = whole.reshape(*x.shape[:-1], weight.shape[0]).float() * scales * scale
    return y if bias is None else y + bias


def whole_product(codes: Tensor, weight: Tensor, filled: bool) -> Tensor:
    """Int8 `codes` (M, d_in) times int8 `weight` (d_out, d_in): (M, d_out) int32.

    torch's product is wrong for some narrow matrices unless d_in is a multiple of 16. On a GPU it takes more than 16
    rows and multiples of 8 outputs only: where `filled`, zeros are added and cut off again.
    """
    (tokens, d_in), d_out = codes.shape, weight.shape[0]
    short = -d_in % 16
    few, narrow = (max(0, 32 - tokens), -d_out % 8) if filled else (0, 0)
    if short or few:
        codes = functional.pad(codes, (0, short, 0, few))
    if short or narrow:  # without a reason it would be copied all the same
        weight = functional.pad(weight, (0, short, 0, narrow))
    return torch._int_mm(codes, weight.t())[:tokens, :d_out]


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` (d_out, d_in) rounded to int8 by row, and the scales (d_out,) that restore it."""
    largest = weight.float().abs().amax(-1, keepdim=True).clamp_min(LEAST)
    return (weight.float() * (LEVELS / largest)).round().to(torch.int8), largest[:, 0] / LEVELS
