"""Ternary projections and feed-forward blocks, and 8-bit linears, on the CPU; on other devices in plain torch.

The kernel is compiled when it is first asked for. Where it cannot be had the same functions compute the same numbers in
plain torch, and one warning says why. That fallback multiplies whole numbers in float32, which is exact. torch's own
int8 product, `_weight_int8pack_mm`, would not do: with bfloat16 inputs it rounds its results to bfloat16, so that the
latent is off by up to 2^-9 and its codes with it; with float32 inputs it is slower than the plain product.

PILON_KERNELS=0 asks for the fallback; PILON_ISA=portable, avx2, vnni, neon or dotprod for one instruction set.
"""

import logging
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pilon_compress.kernels import reference
from pilon_compress.kernels.build import NoKernel, library
from pilon_compress.kernels.cpu_layout import BankTiles, MatrixTiles, Projection, matrix_tiles, tiles
from pilon_compress.kernels.reference import ACTIVATIONS, int8_rows

__all__ = [
    "BankTiles",
    "MatrixTiles",
    "Prepared",
    "Projection",
    "available",
    "ffn",
    "int8_linear",
    "int8_rows",
    "isas",
    "load",
    "matrix_tiles",
    "prepared",
    "prepared_ffn",
    "project",
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
        return torch.ops.pilon.project(x, (*p.tensors()[:-1], bias), p.tiles.d_out, p.group)
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
    # a narrower type rounds the hidden values in between
    if x.dtype == torch.float32 and x.device.type == "cpu" and _fuses(up, down, gate, activation):
        return torch.ops.pilon.ffn(x.contiguous(), *_parts(up, down, gate), *_sizes(up, down, activation))
    runs = [partial(project, p=p) for p in (up, down, gate) if p is not None]
    return _one_by_one(x, activation, *runs)


class Prepared:
    """A projection or a block whose tensors the kernel has seen: a call hands over `x` alone.

    It keeps the tensors, and computes with what they hold then; only `selected` must stay as it was. For dtypes other
    than float32, and for compilers, which have to see the tensors, it does without.
    """

    def __init__(self, number: int, plain: Callable[[Tensor], Tensor]) -> None:
        self._number, self._plain, self._run = number, plain, torch.ops.pilon.run.default
        weakref.finalize(self, torch.ops.pilon.forget, number).atexit = False

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (..., d_in) -> (..., d_out)."""
        if x.dtype != torch.float32 or torch.compiler.is_compiling():
            return self._plain(x)
        y: Tensor = self._run(x.contiguous(), self._number)
        return y


def prepared(p: Projection) -> Callable[[Tensor], Tensor]:
    """`project` by `p`, for many calls: a small projection takes as long as handing over its tensors."""
    plain = partial(project, p=p)
    if p.norm is not None or not _kernel_takes(p) or torch.compiler.is_compiling():
        return plain
    return Prepared(torch.ops.pilon.prepare_project(p.tensors(), p.tiles.d_in, p.tiles.d_out, p.group), plain)


def prepared_ffn(
    up: Projection,
    down: Projection,
    gate: Projection | None = None,
    activation: str | Callable[[Tensor], Tensor] = "relu2",
) -> Callable[[Tensor], Tensor]:
    """`ffn` by these, for many calls."""
    plain = partial(ffn, up=up, down=down, gate=gate, activation=activation)
    if _fuses(up, down, gate, activation):
        sizes = up.tiles.d_in, *_sizes(up, down, activation)
        return Prepared(torch.ops.pilon.prepare_ffn(*_parts(up, down, gate), *sizes), plain)
    runs = [prepared(p) for p in (up, down, gate) if p is not None]
    return lambda x: _one_by_one(x, activation, *runs)


def _one_by_one(
    x: Tensor,
    activation: str | Callable[[Tensor], Tensor],
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
    gate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    return down(act(up(x)) if gate is None else act(gate(x)) * up(x))


def _parts(up: Projection, down: Projection, gate: Projection | None) -> tuple[tuple[Tensor | None, ...], ...]:
    return up.tensors(), () if gate is None else gate.tensors(), down.tensors()


def _sizes(up: Projection, down: Projection, activation: str | Callable[[Tensor], Tensor]) -> tuple[int, ...]:
    assert isinstance(activation, str)
    return up.tiles.d_out, down.tiles.d_out, up.group, down.group, _FUSED[activation]


def _fuses(
    up: Projection, down: Projection, gate: Projection | None, activation: str | Callable[[Tensor], Tensor]
) -> bool:
    """Whether one call may compute the block."""
    if not isinstance(activation, str) or activation not in _FUSED:
        return False
    if gate is not None and gate.group != up.group:
        return False
    return all(p is None or (p.norm is None and _kernel_takes(p)) for p in (up, down, gate))


def _kernel_takes(p: Projection) -> bool:
    return p.tiles.A.device.type == "cpu" and p.fits() and available()


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """An 8-bit linear: `x` (..., d_in), int8 `weight` (d_out, d_in), float32 `scale` (d_out,) -> (..., d_out).

    `x` is quantised per token; the sums are exact integers. `int8_rows` makes `weight` and `scale`. In the dtype of x.
    """
    if x.dtype != torch.float32:  # the bias is added as a layer adds it, after rounding
        y = int8_linear(x.float(), weight, scale).to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)
    bias = None if bias is None else bias.float()
    if x.device.type == "cpu" and available():
        return torch.ops.pilon.int8_linear(x.contiguous(), weight, scale, bias)
    with torch.autocast(x.device.type, enabled=False):
        return reference.int8_linear(x.contiguous(), weight, scale, bias)


def _register_shapes() -> None:
    """What torch.compile and torch.export need to know of the operators."""

    @torch.library.register_fake("pilon::project")
    def project(x: Tensor, parts: list[Tensor | None], d_out: int, group: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], d_out)

    @torch.library.register_fake("pilon::ffn")
    def ffn(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[-4])

    @torch.library.register_fake("pilon::int8_linear")
    def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
