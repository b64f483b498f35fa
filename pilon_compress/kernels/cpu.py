"""Ternary projections and feed-forward blocks, and 8-bit linears, on the CPU; on other devices in plain torch.

The kernel is compiled when it is first asked for. Where it cannot be had the same functions compute the same numbers in
plain torch, and one warning says why. That fallback multiplies whole numbers in float32, which is exact. torch's own
int8 product, `_weight_int8pack_mm`, would not do: with bfloat16 inputs it rounds its results to bfloat16, so that the
latent is off by up to 2^-9 and its codes with it; with float32 inputs it is slower than the plain product.

PILON_KERNELS=0 asks for the fallback; PILON_ISA=portable, avx2, vnni, neon or dotprod for one instruction set.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pilon_compress.kernels import reference
from pilon_compress.kernels.build import NoKernel, library
from pilon_compress.kernels.reference import ACTIVATIONS, int8_rows
from pilon_compress.kernels.tiles import BankTiles, MatrixTiles, Projection, matrix_tiles, tiles

__all__ = [
    "BankTiles",
    "MatrixTiles",
    "Projection",
    "available",
    "compose",
    "ffn",
    "int8_linear",
    "int8_rows",
    "isas",
    "load",
    "matrix_tiles",
    "project",
    "ternary_linear",
    "tiles",
]

_FUSED = {"relu": 0, "relu2": 1}  # activations inside the kernel; others need torch's own exponential to be exact
_loaded: bool | None = None


def load() -> bool:
    """Find or compile the kernel and register its operators, once in a process. Whether it is there."""
    global _loaded
    if _loaded is None:
        try:
            if os.environ.get("PILON_KERNELS") == "0":
                raise NoKernel("PILON_KERNELS=0")
            torch.ops.load_library(str(library()))
            _register_shapes()
            torch.ops.pilon.isa()
            _loaded = True
        except (NoKernel, OSError, RuntimeError) as error:
            _loaded = False
            reason = str(error).splitlines()[0]
            logging.getLogger(__name__).warning("ternary layers run in plain torch, much slower: %s", reason)
    return _loaded


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernel is used; loads it if need be."""
    return load()


def isas() -> list[str]:
    """The instruction set in use, then all that this machine has, best first; empty without the kernel."""
    return str(torch.ops.pilon.isa()).split() if available() else []


def compose(
    x: Tensor,
    bank: BankTiles,
    selected: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    """A composed projection in one call: `x` (..., d_in) -> (..., d_out), in the dtype of x.

    `selected` (k,) int64; `scale`, `shift` (k·r,) and `bias` (d_out,) float32; `group` a multiple of 16, or 0.
    """
    return project(x, Projection(bank, scale, selected, shift, bias, group))


def ternary_linear(x: Tensor, matrix: MatrixTiles, scale: Tensor, bias: Tensor | None = None, group: int = 0) -> Tensor:
    """A dense ternary projection: `x` (..., d_in) -> (..., d_out), in the dtype of x; `scale` (d_out,) float32."""
    return project(x, Projection(matrix, scale, bias=bias, group=group))


def project(x: Tensor, p: Projection) -> Tensor:
    """One projection: `x` (..., d_in) -> (..., d_out), in the dtype of x."""
    if p.norm is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], p.norm, p.eps)
    whole = x.dtype == torch.float32
    y = _projected(x.float().contiguous(), p, p.bias if whole else None).to(x.dtype)
    # in a narrower type the bias is added as a layer adds it, after rounding
    return y if whole or p.bias is None else y + p.bias.to(x.dtype)


def _projected(x: Tensor, p: Projection, bias: Tensor | None) -> Tensor:
    if x.device.type == "cpu" and p.fits() and available():
        A, B, selected, scale, shift, _ = p.tensors()
        return torch.ops.pilon.project(x, A, B, selected, scale, shift, bias, p.tiles.d_out, p.group)
    if isinstance(p.tiles, MatrixTiles):
        return reference.ternary_linear(x, p.tiles.digits(), p.scale, bias, p.group)
    assert p.selected is not None
    return reference.compose(x, *p.tiles.digits(), p.selected, p.scale, p.shift, bias, p.group)


def ffn(
    x: Tensor,
    up: Projection,
    down: Projection,
    gate: Projection | None = None,
    activation: str | Callable[[Tensor], Tensor] = "relu2",
) -> Tensor:
    """A feed-forward block: down(act(up(x))), or down(act(gate(x)) · up(x)); `x` (..., d) -> (..., d), in its dtype.

    One call of the kernel where the activation is relu or relu2 and there is no norm inside; otherwise one for each
    projection, with torch's activation between them, so that the result is the same as of the layers one by one.
    """
    if isinstance(activation, str) and activation in _FUSED and _fuses(x, up, down, gate):
        gate_tensors = (None,) * 6 if gate is None else gate.tensors()
        sizes = up.tiles.d_out, down.tiles.d_out, up.group, down.group
        return torch.ops.pilon.ffn(
            x.contiguous(), *up.tensors(), *gate_tensors, *down.tensors(), *sizes, _FUSED[activation]
        )
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    hidden = act(project(x, up)) if gate is None else act(project(x, gate)) * project(x, up)
    return project(hidden, down)


def _fuses(x: Tensor, up: Projection, down: Projection, gate: Projection | None) -> bool:
    """Whether one call may compute the block: a type narrower than float32 rounds the hidden values in between."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or up.norm is not None or down.norm is not None:
        return False
    if gate is not None and not (gate.norm is None and gate.group == up.group and gate.fits()):
        return False
    return up.fits() and down.fits() and available()


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """An 8-bit linear: `x` (..., d_in), int8 `weight` (d_out, d_in), float32 `scale` (d_out,) -> (..., d_out).

    `x` is quantised per token; the sums are exact integers. `int8_rows` makes `weight` and `scale`. In the dtype of x.
    """
    values = x.float().contiguous()
    if x.device.type == "cpu" and available():
        return torch.ops.pilon.int8_linear(values, weight, scale, bias).to(x.dtype)
    return reference.int8_linear(values, weight, scale, bias).to(x.dtype)


def _register_shapes() -> None:
    """What torch.compile and torch.export need to know of the operators."""

    @torch.library.register_fake("pilon::project")
    def project(
        x: Tensor,
        A: Tensor,
        B: Tensor,
        selected: Tensor,
        scale: Tensor,
        shift: Tensor,
        bias: Tensor,
        d_out: int,
        group: int,
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], d_out)

    @torch.library.register_fake("pilon::ffn")
    def ffn(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[-4])

    @torch.library.register_fake("pilon::int8_linear")
    def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
