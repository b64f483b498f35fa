"""Ternary projections and int8 linears in plain torch: the arithmetic that every kernel reproduces, and the fallback.

Sums of products of quantised activations (at most 127) and ternary weights are integers below 2^24, so float32 matrix
products are exact in any order. Everything else is one float32 operation after another, in the order written here.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 127  # largest quantised magnitude; -128 is not used
LEAST = 1e-20  # least magnitude of a group, so that the scale of zeros is not zero

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def quantise(x: Tensor, group: int = 0, rounding: Callable[[Tensor], Tensor] = torch.round) -> tuple[Tensor, Tensor]:
    """Quantise `x` (..., d): integers (..., d) in float32, and scales (..., 1), or (..., ceil(d / group)).

    A scale is the token's own largest magnitude over 127, so that other tokens of the batch do not matter.
    `rounding`: training passes one with gradients (`nn.ternary_quantizer.straight`).
    """
    x = x.float()
    d = x.shape[-1]
    parts = grouped(x, group or d)
    largest = parts.detach().abs().amax(-1, keepdim=True).clamp_min(LEAST)
    codes = rounding(parts * (largest.reciprocal() * LEVELS))  # torch computes LEVELS / largest in these two steps
    return codes.flatten(-2)[..., :d], largest[..., 0] / LEVELS


def grouped(x: Tensor, group: int) -> Tensor:
    """Reshape `x` (..., d) to (..., ceil(d / group), group), the last group padded with zeros."""
    return functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def product(codes: Tensor, scales: Tensor, matrix: Tensor, group: int = 0) -> Tensor:
    """Multiply `codes` (..., d) with the ternary `matrix` (d, m) and scale: (..., m). Groups are added in order."""
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
    """Compute a projection through a bank: `x` (..., d_in) -> (..., d_out), float32.

    Ternary A (n, d_in, r), B (n, r, d_out) of the bank; `selected` (k,); `scale`, `shift` (k·r,); `bias` (d_out,).
    """
    A, B = A[selected].float(), B[selected].float()
    u = product(*quantise(x, group), A.permute(1, 0, 2).flatten(1), group) * scale
    if shift is not None:
        u = u + shift
    y = product(*quantise(u), B.flatten(0, 1))
    return y if bias is None else y + bias


def ternary_linear(x: Tensor, matrix: Tensor, scale: Tensor, bias: Tensor | None = None, group: int = 0) -> Tensor:
    """Compute a projection by a ternary `matrix` (d_in, d_out): `x` (..., d_in) -> (..., d_out), float32.

    `scale` and `bias` (d_out,); `group` inputs share a scale, 0 for all.
    """
    y = product(*quantise(x, group), matrix.float(), group) * scale
    return y if bias is None else y + bias


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply `x` (..., d_in), quantised per token, with int8 `weight` (d_out, d_in): (..., d_out), float32.

    `scale` and `bias` (d_out,). The sums exceed 2^24, so they are int32 and rounded to float32 once.
    """
    codes, scales = quantise(x)
    sums = integer_product(codes.reshape(-1, x.shape[-1]).to(torch.int8), weight, x.device.type != "cpu")
    y = sums.reshape(*x.shape[:-1], weight.shape[0]).float() * scales * scale
    return y if bias is None else y + bias


def integer_product(codes: Tensor, weight: Tensor, padded: bool) -> Tensor:
    """Multiply int8 `codes` (M, d_in) with int8 `weight` (d_out, d_in): (M, d_out), int32.

    torch._int_mm is wrong for some narrow matrices unless d_in is a multiple of 16. On a GPU it takes only more than 16
    rows and multiples of 8 outputs: with `padded`, zeros are added and cut off again.
    """
    (tokens, d_in), d_out = codes.shape, weight.shape[0]
    pad_in = -d_in % 16
    pad_tokens, pad_out = (max(0, 32 - tokens), -d_out % 8) if padded else (0, 0)
    if pad_in or pad_tokens:
        codes = functional.pad(codes, (0, pad_in, 0, pad_tokens))
    if pad_in or pad_out:  # pad copies the weight even where it adds nothing
        weight = functional.pad(weight, (0, pad_in, 0, pad_out))
    return torch._int_mm(codes, weight.t())[:tokens, :d_out]


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise `weight` (d_out, d_in) to int8 by row; return it and the scales (d_out,)."""
    largest = weight.float().abs().amax(-1, keepdim=True).clamp_min(LEAST)
    return (weight.float() * (LEVELS / largest)).round().to(torch.int8), largest[:, 0] / LEVELS
