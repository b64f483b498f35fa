"""Launch the Triton kernels: allocate their outputs and scratch, choose grids and tile sizes.

Shapes: M tokens, k·r columns of a latent vector u, N outputs, WIDTH inputs with padding. `group` inputs share a scale;
0: all.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from pilon_compress.kernels import triton_gemv as few
from pilon_compress.kernels import triton_tile as many
from pilon_compress.kernels.triton_arithmetic import EMULATED
from pilon_compress.kernels.triton_front import front

FEW = 16  # tokens up to which dp4a is faster than tiles of 16 rows
PREFILL = 512  # tokens from which unpacking the weights first is faster
SMALL = 64 * 1024  # bytes of A that every program of the two-launch block may read
GROUP = 128  # hidden units that share a scale in a feed-forward block
CHUNK = 1024  # values that a program quantises at a time

Coded = tuple[Tensor, Tensor, Tensor]  # codes (M, WIDTH) int8, scales (M, groups), code sums (M, groups)


class Operands(NamedTuple):
    """The tensors of a projection, in the order of the operators' lists; see gpu.GpuProjection."""

    A: Tensor
    B: Tensor
    selected: Tensor
    scale: Tensor
    shift: Tensor | None
    bias: Tensor | None


def wrap_triton(kernel: Any) -> Any:
    """Wrap `kernel` for torch's tracing. The interpreter's kernels need no wrapper."""
    return kernel if EMULATED else torch.library.wrap_triton(kernel)


def launches(tokens: int, gate: Operands | None, up: Operands) -> int:
    """Return the number of launches of a feed-forward block: 2, 4 or 5; 0 where it runs projection by projection."""
    if tokens > FEW:
        return 0
    sides = [up] if gate is None else [gate, up]
    if sum(4 * part.scale.shape[0] * part.A.shape[1] for part in sides) <= SMALL:
        return 2
    return 4 if _one_launch(gate, up) else 5


def _one_launch(gate: Operands | None, up: Operands) -> bool:
    """Return True if one launch can compute the latent vectors of gate and up, which takes equal shapes."""
    return gate is None or (gate.A.shape[2] == up.A.shape[2] and gate.scale.shape == up.scale.shape)


def _power(number: int) -> int:
    """Return the power of two from `number` on, at least 16."""
    return max(16, triton.next_power_of_2(number))


def _new(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _result(x: Tensor, tokens: int, N: int, dtype: torch.dtype) -> Tensor:
    """Allocate results (M, N) in `dtype`; in float32 for the interpreter, which truncates bfloat16 without rounding."""
    return _new(x, tokens, N, dtype=torch.float32 if EMULATED else dtype)


def latent_vectors(x: Tensor, coded: Coded | None, parts: Operands, other: Operands | None, group: int) -> Tensor:
    """Return u (banks, M, k·r) of x (M, d_in), or of `coded`; `other`: a second projection of equal shape, or None."""
    count, rank = parts.A.shape[1:]
    latent = parts.scale.shape[0]
    d_in, width, columns = x.shape[1], 16 * count, 32 if rank % 32 == 0 else 16  # columns of one primitive
    group = group if group < d_in else 0
    groups = -(-d_in // group) if group else 1
    tokens = x.shape[0] if coded is None else coded[0].shape[0]
    banks, second = (1, parts) if other is None else (2, other)
    programs = banks * tokens * (latent // columns)
    codes, scales, sums = coded or _coded(x, programs, width, groups)
    out = _new(x, banks, tokens, latent)
    wrap_triton(few.latent)[(latent // columns, tokens, banks)](
        x, codes, scales, sums, _new(x, programs if group else 1, groups * columns),
        parts.A, parts.selected, second.A, second.selected, out,
        d_in, width, rank, latent, groups,
        CODED=coded is not None, GROUP=group, CHUNK=CHUNK, BN=columns, BK=max(64, group // 16),
    )  # fmt: skip
    return out


def _coded(x: Tensor, rows: int, width: int, groups: int) -> Coded:
    """Allocate codes (rows, width), scales and sums (rows, groups) on the device of x."""
    return (
        _new(x, rows, width, dtype=torch.int8),
        _new(x, rows, groups),
        _new(x, rows, groups, dtype=torch.int32),
    )


def outputs(latents: Tensor, parts: Operands, dtype: torch.dtype) -> Tensor:
    """Return y (M, d_out) of latent vectors in parts (M, groups, k·r)."""
    tokens, count, latent = latents.shape
    per, N = parts.B.shape[1:]
    blocks = triton.cdiv(N, 32)
    codes = _new(latents, tokens * blocks, latent, dtype=torch.int8)
    out = _result(latents, tokens, N, dtype)
    wrap_triton(few.output)[(blocks, tokens)](
        latents, parts.scale, parts.shift, codes, parts.B, parts.selected, parts.bias, out,
        N, latent, per, count,
        U=_power(latent), BN=32, BK=64,
    )  # fmt: skip
    return out.to(dtype)


def hidden_codes(x: Tensor, gate: Operands | None, up: Operands, count: int, act: int) -> Coded:
    """Return the quantised hidden units (M, 16 · count) of x (M, d_in): two launches, three if the banks differ."""
    if _one_launch(gate, up):
        u = latent_vectors(x, None, up, gate, 0).unbind()
    else:
        u = tuple(latent_vectors(x, None, part, None, 0).squeeze(0) for part in (up, gate) if part)
    side = gate or up
    tokens, latent, gate_latent, N = x.shape[0], up.scale.shape[0], side.scale.shape[0], up.B.shape[2]
    groups = triton.cdiv(N, GROUP)
    codes, scales, sums = _coded(x, tokens, 16 * count, groups)
    wrap_triton(few.hidden)[(groups, tokens)](
        u[-1], side.scale, side.shift, side.B, side.selected, side.bias,
        u[0], up.scale, up.shift, up.B, up.selected, up.bias,
        _new(x, tokens * groups, gate_latent + latent, dtype=torch.int8), codes, scales, sums,
        N, 16 * count, gate_latent, latent, side.B.shape[1], up.B.shape[1],
        GATED=gate is not None, ACT=act, GATE_U=_power(gate_latent), UP_U=_power(latent), GROUP=GROUP, BK=16,
        num_warps=8,
    )  # fmt: skip
    return codes, scales, sums


def down_parts(x: Tensor, gate: Operands | None, up: Operands, down: Operands, act: int) -> Tensor:
    """Return the parts (M, groups, k·r) of the down projection's u, one per group of hidden units: one launch."""
    side = gate or up
    latent, gate_latent, down_latent = (part.scale.shape[0] for part in (up, side, down))
    width, N, tokens = 16 * up.A.shape[1], up.B.shape[2], x.shape[0]
    groups, scratch_width = triton.cdiv(N, GROUP), width + latent + gate_latent + GROUP
    scratch, scales, sums = _coded(x, tokens * groups, scratch_width, 1)
    out = _new(x, tokens, groups, down_latent)
    wrap_triton(front)[(groups, tokens)](
        x,
        side.A, side.B, side.scale, side.shift, side.selected, side.bias,
        up.A, up.B, up.scale, up.shift, up.selected, up.bias,
        down.A, down.selected, scratch, scales, sums, out,
        x.shape[1], width, N, 16 * down.A.shape[1], gate_latent, latent, down_latent,
        side.A.shape[2], up.A.shape[2], down.A.shape[2], scratch_width,
        GATED=gate is not None, ACT=act, GATE_U=_power(gate_latent), UP_U=_power(latent), DOWN_U=_power(down_latent),
        GROUP=GROUP, CHUNK=CHUNK, BK=16, BW=16, num_warps=8,
    )  # fmt: skip
    return out


def quantised_rows(x: Tensor, A: Tensor, group: int) -> Coded:
    """Quantise x (M, d_in) for a product with A, in groups where `group` is less than d_in."""
    (tokens, d_in), count = x.shape, A.shape[1]
    group = group if group < d_in else 0
    coded = _coded(x, tokens, 16 * count, -(-d_in // group) if group else 1)
    wrap_triton(many.quantise_rows)[(tokens,)](
        x, *coded, d_in, 16 * count, coded[1].shape[1], GROUP=group, CHUNK=CHUNK
    )  # fmt: skip
    return coded


def quantised_hidden(gate: Tensor | None, up: Tensor, count: int, act: int) -> Coded:
    """Quantise act(up), or act(gate) · up, (M, N), into codes (M, 16 · count)."""
    tokens, N = up.shape
    groups = triton.cdiv(N, GROUP)
    coded = _coded(up, tokens, 16 * count, groups)
    wrap_triton(many.quantise_hidden)[(groups, tokens)](
        gate, up, *coded[:2], N, 16 * count, GATED=gate is not None, ACT=act, GROUP=GROUP, num_warps=1
    )  # fmt: skip
    return coded


def projected(coded: Coded, parts: Operands, group: int, dtype: torch.dtype) -> Tensor:
    """Return y (M, d_out) of codes (M, WIDTH), which have one scale or one for each `group` inputs."""
    tokens, latent = coded[0].shape[0], parts.scale.shape[0]
    u = latent_tiled(coded, parts, group)
    codes, scales, _ = _coded(u, tokens, latent, 1)
    wrap_triton(many.quantise_latents)[(tokens,)](u, parts.scale, parts.shift, codes, scales, latent, U=_power(latent))
    return _product(codes, scales, parts.B, parts.selected, parts.bias, parts.B.shape[2], False, 0, dtype)


def latent_tiled(coded: Coded, parts: Operands, group: int) -> Tensor:
    """Return u (M, k·r) of codes (M, WIDTH), which have one scale or one for each `group` inputs."""
    codes, scales, _ = coded
    group = group if scales.shape[1] > 1 else 0
    return _product(codes, scales, parts.A, parts.selected, None, parts.scale.shape[0], True, group, torch.float32)


def _product(
    codes: Tensor,
    scales: Tensor,
    packed: Tensor,
    selected: Tensor,
    bias: Tensor | None,
    N: int,
    latent_side: bool,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return codes (M, K) · weights, scaled, + bias: (M, N). `packed`: words of A (`latent_side`) or of B."""
    tokens, K = codes.shape
    count, rank = K // 16, packed.shape[2] if latent_side else 16 * packed.shape[1]
    if tokens >= PREFILL and not group and N % 8 == 0:
        weights = _new(codes, N, K, dtype=torch.int8)
        wrap_triton(many.unpack)[(triton.cdiv(N, 64), triton.cdiv(count, 8))](
            packed, selected, weights, count, rank, N, LATENT_SIDE=latent_side, BN=64, BW=8
        )
        y = torch._int_mm(codes, weights.T).float() * scales
        return (y if bias is None else y + bias).to(dtype)
    out = _result(codes, tokens, N, dtype)
    height = 16 if tokens <= 64 else 64
    wrap_triton(many.tile)[(triton.cdiv(tokens, height), triton.cdiv(N, 64))](
        codes, scales, packed, selected, bias, out,
        tokens, K, N, count, rank, scales.shape[1],
        LATENT_SIDE=latent_side, GROUPED=group > 0, BM=height, BN=64, BK=group or 128,
    )  # fmt: skip
    return out.to(dtype)
