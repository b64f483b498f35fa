"""The ternary quantiser: the one arithmetic of training, evaluation, export and kernels.

    weights      digits t in {-1, 0, 1} and a scale: absmean per primitive (BitNet b1.58, Ma et al., 2024)
    activations  8 bits, -127 .. 127, a scale per token, or per token and group of consecutive values

A projection on x, all in float32:

    (q, s) = quantise(x)            u = (q · A) s · scale + shift        scale (k·r) holds everything that folds:
    (q, s) = quantise(u)            y = (q · B) s + bias                 both weight scales, the composition's weight

Sums of products of ternary weights and codes are integers below 2^24, so float32 matrix products compute them exactly,
in any order; each is scaled once. That is why packed weights and kernels reproduce the same outputs bit for bit.
`quantise` and the product are in `kernels.reference`; what training adds to them is here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pilon_compress.kernels.reference import LEAST, LEVELS, grouped

GROUP = 128  # hidden activations: values that share a scale, so that a kernel can quantise a slice of them


class _Round(torch.autograd.Function):
    """Round half to even, within ±limit; the gradient passes straight through (Bengio et al., 2013), beyond it too."""

    @staticmethod
    def forward(x: Tensor, limit: int) -> Tensor:
        return x.round().clamp(-limit, limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def rounded(x: Tensor, limit: int) -> Tensor:
    """Round `x` half to even, within ±limit, with the gradient of `x`."""
    whole: Tensor = _Round.apply(x, limit)
    return whole


Rounding = Callable[[Tensor, int], Tensor]  # `rounded`, or what a training puts in its place


def straight(rounding: Rounding) -> Callable[[Tensor], Tensor]:
    """The rounding of `kernels.reference.quantise`, to codes."""
    return lambda x: rounding(x, LEVELS)


def restored(codes: Tensor, scales: Tensor, group: int = 0) -> Tensor:
    """The values (..., d) that `codes` stand for."""
    if not group or scales.shape[-1] == 1:
        return codes * scales
    return (grouped(codes, group) * scales[..., None]).flatten(-2)[..., : codes.shape[-1]]


def absmean(weight: Tensor) -> Tensor:
    """The scale (n, 1, 1) of each primitive of `weight` (n, d, r): its mean magnitude, whoever selects it."""
    return weight.detach().float().abs().mean((-2, -1), keepdim=True).clamp_min(LEAST)


def digits(weight: Tensor, scale: Tensor, rounding: Rounding = rounded) -> Tensor:
    """-1, 0 or 1 for every number of `weight`, in float32; `scale` broadcasts over it.

    The gradient passes straight through.
    """
    return rounding(weight.float() / scale, 1)


def centred(weight: Tensor, scale: Tensor, share: float) -> Tensor:
    """Return `weight` drawn by a `share` of the way to digits times `scale`, its mean magnitude; both stay as they are.

    Latent numbers gather at the edges between digits while they learn (Nagel et al., 2022). There a first step of any
    size flips many of them at once: of SmolLM2 .2 % at a rate of 5e-4, which brought its KL from 2 to 20 nats.
    """
    drawn = weight.float().lerp(digits(weight, scale) * scale, share)
    mean = 1 - share + share * digits(weight, scale).abs().mean((-2, -1), keepdim=True)
    return (drawn / mean.clamp_min(LEAST)).to(weight.dtype)


class _CachedDigits(torch.autograd.Function):
    """Digits that were made before, with the gradient that `digits` would have."""

    @staticmethod
    def forward(weight: Tensor, held: Tensor, scale: Tensor) -> Tensor:
        return held.view_as(held)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, _, scale = inputs
        ctx.dtype = weight.dtype
        ctx.save_for_backward(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        return (gradient / scale).to(ctx.dtype), None, None


def held_digits(weight: Tensor, held: Tensor, scale: Tensor) -> Tensor:
    """`digits(weight, scale, ...)` that were made before, as `held`, with the gradient of making them."""
    made: Tensor = _CachedDigits.apply(weight, held, scale)
    return made
