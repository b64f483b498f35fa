"""Pick the kernel of a packed layer: `bank` and `matrix` decide when they pack the ternary weights.

    on a CPU    cpu.py, where its kernel is available: banks whose rank is a multiple of 16, all matrices
    on a GPU    gpu.py: ranks and outputs that are multiples of 16, scales for 32 to 256 inputs or for all
    otherwise   reference.py

All compute equal numbers. Triton is tried once: where it fails, one warning says why. PILON_KERNELS=0 selects plain
torch on a GPU too.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from pilon_compress.kernels import cpu, reference
from pilon_compress.kernels.cpu_layout import BankTiles, CpuProjection, MatrixTiles
from pilon_compress.kernels.gpu_layout import GROUPS, MULTIPLE, BankWords, MatrixWords, matrix_words, words

UnpackedBank = tuple[Tensor, Tensor]  # ternary A (n, d_in, r) and B (n, r, d_out), int8
Run = Callable[[Tensor], Tensor]  # x (..., d_in) -> (..., d_out), in the dtype of x
TRITON = {"cuda"}  # device types; tests add "cpu" and set TRITON_INTERPRET=1 to run the kernels without a GPU


def bank(A: Tensor, B: Tensor, group: int) -> BankTiles | BankWords | UnpackedBank:
    """Pack the ternary weights A (n, d_in, r) and B (n, r, d_out), int8, for the kernel that their device and rank get.

    `group`: inputs that share a scale, 0 for all.
    """
    rank = A.shape[2]
    if _by_triton(A.device.type, rank, group):
        return words(A, B)
    return cpu.tiles(A, B) if A.device.type == "cpu" and rank % 16 == 0 and cpu.available() else (A, B)


def matrix(weights: Tensor, group: int) -> MatrixTiles | MatrixWords | Tensor:
    """Pack a ternary matrix (d_in, d_out), int8, for the kernel that its device and width get; `group` as in `bank`."""
    if _by_triton(weights.device.type, weights.shape[1], group):
        return matrix_words(weights)
    return cpu.matrix_tiles(weights) if weights.device.type == "cpu" and cpu.available() else weights


def composed(
    packed: BankTiles | BankWords | UnpackedBank,
    selected: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    group: int = 0,
) -> Run:
    """Return a layer's projection through the result of `bank`; other arguments are those of `reference.compose`."""
    if isinstance(packed, BankTiles):
        return _isolated(cpu.prepared(CpuProjection(packed, scale, selected, shift, None, group)))
    if isinstance(packed, BankWords):
        from pilon_compress.kernels import gpu

        words = packed
        return _isolated(lambda x: gpu.compose(x, words, selected, scale, shift, None, group))
    A, B = packed
    return _isolated(lambda x: reference.compose(x, A, B, selected, scale, shift, None, group).to(x.dtype))


def multiplied(packed: MatrixTiles | MatrixWords | Tensor, scale: Tensor, group: int = 0) -> Run:
    """Return a layer's projection by the result of `matrix`; `scale` (d_out,)."""
    if isinstance(packed, MatrixTiles):
        return _isolated(cpu.prepared(CpuProjection(packed, scale, group=group)))
    if isinstance(packed, MatrixWords):
        from pilon_compress.kernels import gpu

        words = packed
        return _isolated(lambda x: gpu.ternary_linear(x, words, scale, None, group))
    weights = packed
    return _isolated(lambda x: reference.ternary_linear(x, weights, scale, None, group).to(x.dtype))


def _isolated(run: Run) -> Run:
    """Wrap `run` so that it runs without autocast, and on the GPU of its input."""
    if isinstance(run, cpu.Prepared):  # one operator, which autocast leaves alone
        return run

    def isolated(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False), _on_gpu_of(x):
            return run(x)

    return isolated


def _by_triton(device: str, outputs: int, group: int) -> bool:
    return device in TRITON and outputs % MULTIPLE == 0 and group in (0, *GROUPS) and available(device)


@torch.compiler.assume_constant_result
def available(device: str) -> bool:
    """Return True if the Triton kernels work on `device` (a device type) and so are used for fitting shapes."""
    return _works(device)


@cache
def _works(device: str) -> bool:
    """Return True if a small product is right, by the kernels for few tokens and for many; otherwise warn why."""
    try:
        if os.environ.get("PILON_KERNELS") == "0":
            raise RuntimeError("PILON_KERNELS=0")
        from pilon_compress.kernels import gpu

        ones = torch.ones(32, 16, dtype=torch.int8, device=device)
        for tokens in (1, 17):
            y = gpu.ternary_linear(
                torch.ones(tokens, 32, device=device), matrix_words(ones), torch.ones(16, device=device)
            )
            if not torch.allclose(y, torch.full_like(y, 32.0)):
                raise RuntimeError("the kernels compute wrong numbers on this device")
    except Exception as error:  # noqa: BLE001  triton, its compiler, the driver and the GPU each raise their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        logging.getLogger(__name__).warning("ternary layers on %s run in plain torch, slower: %s", device, reason)
        return False
    return True


def _on_gpu_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of `x` current, since Triton launches on the current one; a no-op while a compiler traces."""
    return nullcontext() if torch.compiler.is_compiling() or not x.is_cuda else torch.cuda.device_of(x)
