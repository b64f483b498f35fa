"""Which kernel computes a layer's digits: `bank` and `matrix` choose when they pack them, and nothing else does.

    on a CPU    cpu.py, where the kernel can be had: banks whose rank is a multiple of 16, all matrices
    on a GPU    gpu.py, ranks and outputs that are multiples of 16, scales for 32 to 256 inputs or for all
    otherwise   reference.py

All compute the same numbers. Triton is tried once: where it fails, one warning says why. PILON_KERNELS=0 asks for plain
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
from pilon_compress.kernels.cpu_layout import BankTiles, MatrixTiles, Projection
from pilon_compress.kernels.gpu_layout import GROUPS, MULTIPLE, BankWords, MatrixWords, matrix_words, words

Digits = tuple[Tensor, Tensor]
Run = Callable[[Tensor], Tensor]  # x (..., d_in) -> (..., d_out), in the dtype of x
TRITON = {"cuda"}  # devices; with "cpu" among them, and TRITON_INTERPRET=1, tests run the kernels without a GPU


def bank(A: Tensor, B: Tensor, group: int) -> BankTiles | BankWords | Digits:
    """The digits A (n, d_in, r) and B (n, r, d_out), int8, as they are computed with.

    `group`: how many inputs share a scale; 0: all.
    """
    rank = A.shape[2]
    if _by_triton(A.device.type, rank, group):
        return words(A, B)
    return cpu.tiles(A, B) if A.device.type == "cpu" and rank % 16 == 0 and cpu.available() else (A, B)


def matrix(digits: Tensor, group: int) -> MatrixTiles | MatrixWords | Tensor:
    """The same for a matrix (d_in, d_out)."""
    if _by_triton(digits.device.type, digits.shape[1], group):
        return matrix_words(digits)
    return cpu.matrix_tiles(digits) if digits.device.type == "cpu" and cpu.available() else digits


def composed(
    packed: BankTiles | BankWords | Digits, selected: Tensor, scale: Tensor, shift: Tensor | None = None, group: int = 0
) -> Run:
    """A layer's projection through a `bank`, for many calls; the rest as of `reference.compose`."""
    if isinstance(packed, BankTiles):
        return _alone(cpu.prepared(Projection(packed, scale, selected, shift, None, group)))
    if isinstance(packed, BankWords):
        from pilon_compress.kernels import gpu

        words = packed
        return _alone(lambda x: gpu.compose(x, words, selected, scale, shift, None, group))
    A, B = packed
    return _alone(lambda x: reference.compose(x, A, B, selected, scale, shift, None, group).to(x.dtype))


def multiplied(packed: MatrixTiles | MatrixWords | Tensor, scale: Tensor, group: int = 0) -> Run:
    """The same for a `matrix`."""
    if isinstance(packed, MatrixTiles):
        return _alone(cpu.prepared(Projection(packed, scale, group=group)))
    if isinstance(packed, MatrixWords):
        from pilon_compress.kernels import gpu

        words = packed
        return _alone(lambda x: gpu.ternary_linear(x, words, scale, None, group))
    digits = packed
    return _alone(lambda x: reference.ternary_linear(x, digits, scale, None, group).to(x.dtype))


def _alone(run: Run) -> Run:
    """`run` out of reach of autocast, and on the GPU of its input."""
    if isinstance(run, cpu.Prepared):  # it has nothing that autocast would touch
        return run

    def undisturbed(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False), _on(x):
            return run(x)

    return undisturbed


def _by_triton(device: str, outputs: int, group: int) -> bool:
    return device in TRITON and outputs % MULTIPLE == 0 and group in (0, *GROUPS) and available(device)


@torch.compiler.assume_constant_result
def available(device: str) -> bool:
    """Whether the Triton kernels are used on `device`, on tensors that suit them."""
    return _works(device)


@cache
def _works(device: str) -> bool:
    """Whether a small matrix comes out right, by the kernels for few tokens and for more."""
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
                raise RuntimeError("the kernels give wrong numbers here")
    except Exception as error:  # noqa: BLE001  triton, its compiler, the driver and the card each fail in their own way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        logging.getLogger(__name__).warning("ternary layers on %s run in plain torch, slower: %s", device, reason)
        return False
    return True


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be that of `x`; compilers see to that themselves."""
    return nullcontext() if torch.compiler.is_compiling() or not x.is_cuda else torch.cuda.device_of(x)
