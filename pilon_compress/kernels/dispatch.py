"""Pick the kernel of a packed layer: `bank` and `matrix` decide when they pack the ternary weights.

    on a CPU    cpu.py, where its kernel is available, with scales for a multiple of 16 inputs or for all
    on a GPU    gpu.py, with scales for 32 to 256 inputs or for all
    otherwise   reference.py

All compute equal numbers. Ranks, and on a GPU the outputs of a matrix, are padded to multiples of 16 by zeros, which
change no sum; of odd ranks `side_by_side` makes one primitive for a layer, padded once. A layer that no kernel takes
says so in one warning for each reason; where a kernel does not work at all, one warning says why. PILON_KERNELS=0
selects plain torch on a GPU too.
"""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pilon_compress.kernels import cpu, reference
from pilon_compress.kernels.cpu_layout import MOST_INPUTS, OUTPUTS, BankTiles, CpuProjection, MatrixTiles
from pilon_compress.kernels.gpu_layout import GROUPS, MULTIPLE, BankWords, MatrixWords, matrix_words, words

log = logging.getLogger(__name__)

UnpackedBank = tuple[Tensor, Tensor]  # ternary A (n, d_in, r) and B (n, r, d_out), int8
Run = Callable[[Tensor], Tensor]  # x (..., d_in) -> (..., d_out), in the dtype of x
TRITON = {"cuda"}  # device types; tests add "cpu" and set TRITON_INTERPRET=1 to run the kernels without a GPU
TORCH = "torch"
BROKEN = "the kernel does not work here"  # one warning has said why, for all layers
_said: set[str] = set()  # reasons that a warning has given


class Kernel(NamedTuple):
    """The kernel of a layer: an instruction set of the CPU kernel, "triton", or "torch" and the `reason` for it."""

    name: str
    reason: str = ""


def kernel(device: str, d_in: int, group: int) -> Kernel:
    """Return the kernel of ternary layers with `d_in` inputs, of which `group` (0: all) share a scale, by device type.

    Compiles the CPU kernel where it is not there yet.
    """
    if device in TRITON:
        if group not in (0, *GROUPS):
            return Kernel(TORCH, f"the Triton kernels take no scales for {group} inputs, only {GROUPS} or all")
        return Kernel("triton") if available(device) else Kernel(TORCH, BROKEN)
    if device != "cpu":
        return Kernel(TORCH, f"there is no ternary kernel for {device} devices")
    if group % OUTPUTS:
        return Kernel(TORCH, f"the CPU kernel takes no scales for {group} inputs, only multiples of {OUTPUTS} or all")
    if (group or d_in) > MOST_INPUTS:
        return Kernel(TORCH, f"the CPU kernel takes at most {MOST_INPUTS:,} inputs that share a scale")
    return Kernel(cpu.isas()[0]) if cpu.available() else Kernel(TORCH, BROKEN)


def padded(size: int) -> int:
    """Return the multiple of 16 that kernels compute a rank, or the outputs of a matrix, as."""
    return size + -size % MULTIPLE


def bank(A: Tensor, B: Tensor, group: int, name: str = "") -> BankTiles | BankWords | UnpackedBank:
    """Pack the ternary weights A (n, d_in, r) and B (n, r, d_out), int8, for the kernel of their device.

    `group`: inputs that share a scale, 0 for all. `name`: the module's, for the warning where no kernel takes it.
    """
    found = _chosen(A.device.type, A.shape[1], group, name or "a ternary bank")
    if found == TORCH:
        return A, B
    A, B = pad_bank(A, B)
    return words(A, B) if found == "triton" else cpu.tiles(A, B)


def pad_bank(A: Tensor, B: Tensor) -> UnpackedBank:
    """Return A (n, d_in, r) and B (n, r, d_out) with zeros for the components up to the next multiple of 16."""
    more = padded(A.shape[2]) - A.shape[2]
    return pad(A, (0, more)), pad(B, (0, 0, 0, more))


def matrix(weights: Tensor, group: int, name: str = "") -> MatrixTiles | MatrixWords | Tensor:
    """Pack a ternary matrix (d_in, d_out), int8, for the kernel of its device; `group` and `name` as in `bank`."""
    found = _chosen(weights.device.type, weights.shape[0], group, name or "a ternary matrix")
    if found == TORCH:
        return weights
    if found == "triton":
        return matrix_words(pad(weights, (0, padded(weights.shape[1]) - weights.shape[1])))
    return cpu.matrix_tiles(weights)


def side_by_side(A: Tensor, B: Tensor, selected: Tensor) -> UnpackedBank:
    """Return the `selected` (k,) primitives of A (n, d_in, r) and B (n, r, d_out) as one of rank k·r."""
    return A[selected].permute(1, 0, 2).flatten(1)[None], B[selected].flatten(0, 1)[None]


def composed(
    packed: BankTiles | BankWords | UnpackedBank,
    selected: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    group: int = 0,
) -> Run:
    """Return a layer's projection through the result of `bank`; other arguments are those of `reference.compose`."""
    if isinstance(packed, tuple) and not isinstance(packed, BankWords):
        A, B = packed
        return _isolated(lambda x: reference.compose(x, A, B, selected, scale, shift, None, group).to(x.dtype))
    rank = packed.rank if isinstance(packed, BankTiles) else packed.A.shape[2]
    scale = widened(scale, len(selected), rank)
    shift = None if shift is None else widened(shift, len(selected), rank)
    if isinstance(packed, BankTiles):
        return _isolated(cpu.prepared(CpuProjection(packed, scale, selected, shift, None, group)))
    from pilon_compress.kernels import gpu

    words = packed
    return _isolated(lambda x: gpu.compose(x, words, selected, scale, shift, None, group))


def widened(vector: Tensor, k: int, rank: int) -> Tensor:
    """Return a vector (k·r,), a number for each component, with zeros for the components up to `rank` in each."""
    short = vector.unflatten(0, (k, -1))
    return vector if short.shape[1] == rank else pad(short, (0, rank - short.shape[1])).flatten()


def multiplied(packed: MatrixTiles | MatrixWords | Tensor, scale: Tensor, group: int = 0) -> Run:
    """Return a layer's projection by the result of `matrix`; `scale` (d_out,)."""
    if isinstance(packed, MatrixTiles):
        return _isolated(cpu.prepared(CpuProjection(packed, scale, group=group)))
    if isinstance(packed, MatrixWords):
        from pilon_compress.kernels import gpu

        words, d_out = packed, len(scale)
        if d_out == words.A.shape[2]:
            return _isolated(lambda x: gpu.ternary_linear(x, words, scale, None, group))
        wide = pad(scale, (0, words.A.shape[2] - d_out))
        return _isolated(lambda x: gpu.ternary_linear(x, words, wide, None, group)[..., :d_out])
    weights = packed
    return _isolated(lambda x: reference.ternary_linear(x, weights, scale, None, group).to(x.dtype))


@torch.compiler.assume_constant_result
def _chosen(device: str, d_in: int, group: int, name: str) -> str:
    """Return the name of the kernel; where it is plain torch for a reason that nothing has said yet, warn."""
    found = kernel(device, d_in, group)
    if found.name == TORCH and found.reason != BROKEN and found.reason not in _said:
        _said.add(found.reason)
        log.warning("%s runs in plain torch, slower, and so do others like it: %s", name, found.reason)
    return found.name


def _isolated(run: Run) -> Run:
    """Wrap `run` so that it runs without autocast, and on the GPU of its input."""
    if isinstance(run, cpu.Prepared):  # one operator, which autocast leaves alone
        return run

    def isolated(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False), _on_gpu_of(x):
            return run(x)

    return isolated


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
        logging.getLogger(__name__).warning("all ternary layers on %s run in plain torch, slower: %s", device, reason)
        return False
    return True


def _on_gpu_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of `x` current, since Triton launches on the current one; a no-op while a compiler traces."""
    return nullcontext() if torch.compiler.is_compiling() or not x.is_cuda else torch.cuda.device_of(x)
