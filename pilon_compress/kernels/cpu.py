"""Compute ternary projections and feed-forward blocks on the CPU; on other devices in plain torch.

The kernel is compiled at the first use. Where that fails, the functions compute equal numbers in plain torch, and one
warning says why. The fallback multiplies integers in float32, which is exact. torch's own int8 product,
`_weight_int8pack_mm`, is no substitute: with bfloat16 inputs it rounds its results to bfloat16, an error of up to 2^-9
in the latent vector and so in its quantised values; with float32 inputs it is slower than the plain product.

PILON_KERNELS=0 selects the fallback; PILON_ISA=portable, avx2, vnni, neon or dotprod one instruction set.
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
from pilon_compress.kernels.build import KernelUnavailable, library
from pilon_compress.kernels.cpu_layout import BankTiles, CpuProjection, MatrixTiles, matrix_tiles, tiles
from pilon_compress.kernels.reference import ACTIVATIONS

__all__ = [
    "BankTiles",
    "CpuProjection",
    "MatrixTiles",
    "Prepared",
    "available",
    "ffn",
    "isas",
    "load",
    "matrix_tiles",
    "prepared",
    "prepared_ffn",
    "project",
    "tiles",
]

_FUSED = {"relu": 0, "relu2": 1}  # activations inside the kernel; the others need torch's exponential to be exact
_loaded: bool | None = None


def load() -> bool:
    """Find or compile the kernel and register its operators, once per process. Return True if that succeeded."""
    global _loaded
    if _loaded is None:
        try:
            if os.environ.get("PILON_KERNELS") == "0":
                raise KernelUnavailable("PILON_KERNELS=0")
            torch.ops.load_library(str(library()))
            _register_fakes()
            torch.ops.pilon.isa()
            _loaded = True
        except (KernelUnavailable, OSError, RuntimeError) as error:
            _loaded = False
            reason = str(error).splitlines()[0]
            logging.getLogger(__name__).warning(
                "all ternary and 8-bit layers run in plain torch, much slower: %s", reason
            )
    return _loaded


@torch.compiler.assume_constant_result
def available() -> bool:
    """Return True if the kernel is used; load it first where no call has done so."""
    return load()


def isas() -> list[str]:
    """Return the name of the instruction set in use, then all that this machine has, best first; [] without kernel."""
    return str(torch.ops.pilon.isa()).split() if available() else []


def project(x: Tensor, p: CpuProjection) -> Tensor:
    """Compute the projection `p` of `x` (..., d_in): (..., d_out), in the dtype of x."""
    if p.norm is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], p.norm, p.eps)
    is_float = x.dtype == torch.float32
    y = _projected(x.float().contiguous(), p, p.bias if is_float else None).to(x.dtype)
    # in a narrower dtype the bias is added after rounding, as a torch layer does
    return y if is_float or p.bias is None else y + p.bias.to(x.dtype)


def _projected(x: Tensor, p: CpuProjection, bias: Tensor | None) -> Tensor:
    if x.device.type == "cpu" and p.fits() and available():
        return torch.ops.pilon.project(x, (*p.tensors()[:-1], bias), p.tiles.d_out, p.group)
    if isinstance(p.tiles, MatrixTiles):
        return reference.ternary_linear(x, p.tiles.unpacked(), p.scale, bias, p.group)
    assert p.selected is not None
    return reference.compose(x, *p.tiles.unpacked(), p.selected, p.scale, p.shift, bias, p.group)


def ffn(
    x: Tensor,
    up: CpuProjection,
    down: CpuProjection,
    gate: CpuProjection | None = None,
    activation: str | Callable[[Tensor], Tensor] = "relu2",
) -> Tensor:
    """Compute down(act(up(x))), or down(act(gate(x)) · up(x)), of `x` (..., d): (..., d), in the dtype of x.

    This takes one kernel call where the activation is relu or relu2 and there is no norm inside; otherwise one call per
    projection with torch's activation between them. Either way the result equals that of the layers called one by one.
    """
    # narrower dtypes round the hidden values between the projections, which the fused call does not
    if x.dtype == torch.float32 and x.device.type == "cpu" and _fuses(up, down, gate, activation):
        return torch.ops.pilon.ffn(x.contiguous(), *_tensors(up, down, gate), *_sizes(up, down, activation))
    projections = [partial(project, p=p) for p in (up, down, gate) if p is not None]
    return _one_by_one(x, activation, *projections)


class Prepared:
    """A projection or block whose tensors are registered with the kernel, so that a call passes `x` alone.

    The tensors stay referenced and may change in place, except `selected`. Calls with other dtypes than float32, and
    calls that a compiler traces, take the unprepared function `plain`.
    """

    def __init__(self, number: int, plain: Callable[[Tensor], Tensor]) -> None:
        """Wrap the registration `number` that a `prepare_*` operator returned; it ends with this object."""
        self._number, self._plain, self._run = number, plain, torch.ops.pilon.run.default
        weakref.finalize(self, torch.ops.pilon.forget, number).atexit = False

    def __call__(self, x: Tensor) -> Tensor:
        """Compute `x` (..., d_in) -> (..., d_out)."""
        if x.dtype != torch.float32 or torch.compiler.is_compiling():
            return self._plain(x)
        y: Tensor = self._run(x.contiguous(), self._number)
        return y


def prepared(p: CpuProjection) -> Callable[[Tensor], Tensor]:
    """Return `project` by `p` for many calls. Passing the tensors takes as long as computing a small projection."""
    plain = partial(project, p=p)
    if p.norm is not None or not _kernel_takes(p) or torch.compiler.is_compiling():
        return plain
    return Prepared(torch.ops.pilon.prepare_project(p.tensors(), p.tiles.d_in, p.tiles.d_out, p.group), plain)


def prepared_ffn(
    up: CpuProjection,
    down: CpuProjection,
    gate: CpuProjection | None = None,
    activation: str | Callable[[Tensor], Tensor] = "relu2",
) -> Callable[[Tensor], Tensor]:
    """Return `ffn` by these projections for many calls."""
    plain = partial(ffn, up=up, down=down, gate=gate, activation=activation)
    if _fuses(up, down, gate, activation):
        sizes = up.tiles.d_in, *_sizes(up, down, activation)
        return Prepared(torch.ops.pilon.prepare_ffn(*_tensors(up, down, gate), *sizes), plain)
    projections = [prepared(p) for p in (up, down, gate) if p is not None]
    return lambda x: _one_by_one(x, activation, *projections)


def _one_by_one(
    x: Tensor,
    activation: str | Callable[[Tensor], Tensor],
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
    gate: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    act = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    return down(act(up(x)) if gate is None else act(gate(x)) * up(x))


def _tensors(
    up: CpuProjection, down: CpuProjection, gate: CpuProjection | None
) -> tuple[tuple[Tensor | None, ...], ...]:
    return up.tensors(), () if gate is None else gate.tensors(), down.tensors()


def _sizes(up: CpuProjection, down: CpuProjection, activation: str | Callable[[Tensor], Tensor]) -> tuple[int, ...]:
    assert isinstance(activation, str)
    return up.tiles.d_out, down.tiles.d_out, up.group, down.group, _FUSED[activation]


def _fuses(
    up: CpuProjection, down: CpuProjection, gate: CpuProjection | None, activation: str | Callable[[Tensor], Tensor]
) -> bool:
    """Return True if one kernel call may compute the block."""
    if not isinstance(activation, str) or activation not in _FUSED:
        return False
    if gate is not None and gate.group != up.group:
        return False
    return all(p is None or (p.norm is None and _kernel_takes(p)) for p in (up, down, gate))


def _kernel_takes(p: CpuProjection) -> bool:
    return p.tiles.A.device.type == "cpu" and p.fits() and available()


def _register_fakes() -> None:
    """Register the operators' output shapes, which torch.compile and torch.export need."""

    @torch.library.register_fake("pilon::project")
    def project(x: Tensor, parts: list[Tensor | None], d_out: int, group: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], d_out)

    @torch.library.register_fake("pilon::ffn")
    def ffn(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], rest[-4])

    def of_width(x: Tensor, d_out: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], d_out)

    torch.library.register_fake("pilon::int8_linear", lambda x, words, sums, scale, bias, d_out: of_width(x, d_out))
    for name in ("integer_linear", "integer_compose"):
        torch.library.register_fake(f"pilon::{name}", lambda x, *rest: of_width(x, rest[-3]))
