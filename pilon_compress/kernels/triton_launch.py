"""The Triton kernels put together: torch operators for one projection and for a feed-forward block.

A projection is handed over as a list: A, B, selected, scale, shift or None, bias or None (see gpu.Projection).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from pilon_compress.kernels import triton_gemv as few
from pilon_compress.kernels import triton_tile as many
from pilon_compress.kernels.triton_arithmetic import EMULATED

FEW = 16  # tokens, up to which dp4a serves better than tiles of 16 rows
PREFILL = 512  # tokens, from which unpacking the digits first is worth it
SMALL = 64 * 1024  # bytes of A that every program of the two-launch block may read
GROUP = 128  # hidden units that share a scale in a feed-forward block
CHUNK = 1024  # numbers that a program quantises at a time

Parts = Sequence[Tensor | None]
Coded = tuple[Tensor, Tensor, Tensor]  # codes (M, WIDTH) int8, scales (M, groups), code sums (M, groups)


def wrap_triton(kernel: Any) -> Any:
    """torch's wrap_triton; the interpreter's kernels run as they are."""
    return kernel if EMULATED else torch.library.wrap_triton(kernel)


@torch.library.triton_op("pilon_gpu::project", mutates_args=())
def project(x: Tensor, projection: Sequence[Tensor | None], group: int) -> Tensor:
    A, B, selected, scale, shift, bias = projection
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[0] <= FEW:
        u = _latent(rows, None, A, selected, A, selected, scale.shape[0], group)
        y = _output(u[0, :, None], projection, x.dtype)
    else:
        y = _tiled(_code(rows, A, group), projection, group, x.dtype)
    return y.reshape(*x.shape[:-1], B.shape[2])


@project.register_fake
def _(x: Tensor, projection: Sequence[Tensor | None], group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], projection[1].shape[2])  # type: ignore[union-attr]


@torch.library.triton_op("pilon_gpu::ffn", mutates_args=())
def ffn(
    x: Tensor,
    gate: Sequence[Tensor | None],
    up: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    act: int,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    number = launches(rows.shape[0], gate, up)
    if number == 2:
        y = _output(_front(rows, gate, up, down, act), down, x.dtype)
    elif number:
        A, _, selected, scale, _, _ = down
        coded = _hidden(rows, gate, up, A.shape[1], act)
        u = _latent(rows.new_empty(0, up[1].shape[2]), coded, A, selected, A, selected, scale.shape[0], GROUP)
        y = _output(u[0, :, None], down, x.dtype)
    else:
        coded = _code(rows, up[0], 0)
        y_up = _tiled(coded, up, 0, torch.float32)
        y_gate = _tiled(coded, gate, 0, torch.float32) if gate else y_up
        y = _tiled(_code_hidden(y_gate, y_up, bool(gate), down[0].shape[1], act), down, GROUP, x.dtype)
    return y.reshape(*x.shape[:-1], down[1].shape[2])


@ffn.register_fake
def _(
    x: Tensor,
    gate: Sequence[Tensor | None],
    up: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    act: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], down[1].shape[2])  # type: ignore[union-attr]


def launches(tokens: int, gate: Parts, up: Parts) -> int:
    """How many launches a feed-forward block of so many tokens takes: 2, 4 or 5; 0: projection by projection."""
    if tokens > FEW:
        return 0
    if sum(4 * scale.shape[0] * A.shape[1] for A, _, _, scale, _, _ in filter(None, (gate, up))) <= SMALL:
        return 2
    return 4 if _alike(gate, up) else 5


def _alike(gate: Parts, up: Parts) -> bool:
    """Whether one launch can compute the latent vectors of both (or there is but one)."""
    return not gate or gate[0].shape[2] == up[0].shape[2] and gate[3].shape == up[3].shape


def _power(number: int) -> int:
    return max(16, triton.next_power_of_2(number))


def _new(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _latent(
    x: Tensor,
    coded: Coded | None,
    A: Tensor,
    selected: Tensor,
    other_A: Tensor,
    other_selected: Tensor,
    latent: int,
    group: int,
) -> Tensor:
    """u (1 or 2, M, k·r) of x (M, d_in), or of codes; 2 if the other bank is another one."""
    count, rank = A.shape[1:]
    d_in, width, columns = x.shape[1], 16 * count, 32 if rank % 32 == 0 else 16  # columns of one primitive
    group = group if group < d_in else 0
    groups = -(-d_in // group) if group else 1
    tokens = x.shape[0] if coded is None else coded[0].shape[0]
    banks = 1 if other_A is A and other_selected is selected else 2
    programs = banks * tokens * (latent // columns)
    codes, scales, sums = coded or _room(x, programs, width, groups)
    out = _new(x, banks, tokens, latent)
    wrap_triton(few.latent)[(latent // columns, tokens, banks)](
        x, codes, scales, sums, _new(x, programs if group else 1, groups * columns), A, selected, other_A,
        other_selected, out,
        d_in, width, rank, latent, groups,
        CODED=coded is not None, GROUP=group, CHUNK=CHUNK, BN=columns, BK=max(64, group // 16),
    )  # fmt: skip
    return out


def _room(x: Tensor, rows: int, width: int, groups: int) -> Coded:
    return (
        _new(x, rows, width, dtype=torch.int8),
        _new(x, rows, groups),
        _new(x, rows, groups, dtype=torch.int32),
    )


def _output(parts: Tensor, projection: Parts, dtype: torch.dtype) -> Tensor:
    """y (M, d_out) of the latent parts (M, parts, k·r)."""
    _, B, selected, scale, shift, bias = projection
    tokens, count, latent = parts.shape
    per, N = B.shape[1:]
    blocks = triton.cdiv(N, 32)
    out = _new(parts, tokens, N, dtype=dtype)
    wrap_triton(few.output)[(blocks, tokens)](
        parts.contiguous(), scale, shift, _new(parts, tokens * blocks, latent, dtype=torch.int8), B, selected, bias, out,
        N, latent, per, count,
        U=_power(latent), BN=32, BK=64,
    )  # fmt: skip
    return out


def _hidden(x: Tensor, gate: Parts, up: Parts, count: int, act: int) -> Coded:
    """The hidden activations of x (M, d_in) as codes (M, 16 · count): two launches, three if the banks differ."""
    A, B, selected, scale, shift, bias = up
    gate_A, gate_B, gate_selected, gate_scale, gate_shift, gate_bias = gate or up
    tokens, latent, gate_latent = x.shape[0], scale.shape[0], gate_scale.shape[0]
    if _alike(gate, up):
        u = _latent(x, None, A, selected, gate_A, gate_selected, latent, 0)
        u, gate_u = u[0], u[-1]
    else:
        u = _latent(x, None, A, selected, A, selected, latent, 0)
        gate_u = _latent(x, None, gate_A, gate_selected, gate_A, gate_selected, gate_latent, 0)
    N = B.shape[2]
    groups = triton.cdiv(N, GROUP)
    codes, scales, sums = _room(x, tokens, 16 * count, groups)
    wrap_triton(few.hidden)[(groups, tokens)](
        gate_u, gate_scale, gate_shift, gate_B, gate_selected, gate_bias,
        u, scale, shift, B, selected, bias,
        _new(x, tokens * groups, gate_latent + latent, dtype=torch.int8), codes, scales, sums,
        N, 16 * count, gate_latent, latent, gate_B.shape[1], B.shape[1],
        GATED=bool(gate), ACT=act, GATE_U=_power(gate_latent), UP_U=_power(latent), GROUP=GROUP, BK=16,
    )  # fmt: skip
    return codes, scales, sums


def _front(x: Tensor, gate: Parts, up: Parts, down: Parts, act: int) -> Tensor:
    """The parts (M, groups, k·r) of the down projection's latent vector, one per group of hidden units: one launch."""
    A, B, selected, scale, shift, bias = up
    gate_A, gate_B, gate_selected, gate_scale, gate_shift, gate_bias = gate or up
    down_A, _, down_selected, down_scale, _, _ = down
    tokens, latent, gate_latent, down_latent = x.shape[0], scale.shape[0], gate_scale.shape[0], down_scale.shape[0]
    groups = triton.cdiv(B.shape[2], GROUP)
    room = 16 * A.shape[1] + latent + gate_latent + GROUP
    scratch, scales, sums = _room(x, tokens * groups, room, 1)
    parts = _new(x, tokens, groups, down_latent)
    wrap_triton(few.front)[(groups, tokens)](
        x,
        gate_A, gate_B, gate_scale, gate_shift, gate_selected, gate_bias,
        A, B, scale, shift, selected, bias,
        down_A, down_selected, scratch, scales, sums, parts,
        x.shape[1], 16 * A.shape[1], B.shape[2], 16 * down_A.shape[1], gate_latent, latent, down_latent,
        gate_A.shape[2], A.shape[2], down_A.shape[2], room,
        GATED=bool(gate), ACT=act, GATE_U=_power(gate_latent), UP_U=_power(latent), DOWN_U=_power(down_latent),
        GROUP=GROUP, CHUNK=CHUNK, BK=16, BW=16, num_warps=8,
    )  # fmt: skip
    return parts


def _code(x: Tensor, A: Tensor, group: int) -> Coded:
    """x (M, d_in) quantised."""
    (tokens, d_in), count = x.shape, A.shape[1]
    group = group if group < d_in else 0
    coded = _room(x, tokens, 16 * count, -(-d_in // group) if group else 1)
    wrap_triton(many.code_rows)[(tokens,)](
        x, *coded, d_in, 16 * count, coded[1].shape[1], GROUP=group, CHUNK=CHUNK
    )  # fmt: skip
    return coded


def _code_hidden(gate: Tensor, up: Tensor, gated: bool, count: int, act: int) -> Coded:
    tokens, N = up.shape
    groups = triton.cdiv(N, GROUP)
    coded = _room(up, tokens, 16 * count, groups)
    wrap_triton(many.code_hidden)[(groups, tokens)](
        gate, up, *coded[:2], N, 16 * count, GATED=gated, ACT=act, GROUP=GROUP, num_warps=1
    )  # fmt: skip
    return coded


def _tiled(coded: Coded, projection: Parts, group: int, dtype: torch.dtype) -> Tensor:
    """y (M, d_out) of codes (M, WIDTH), which have one scale or one for each `group`."""
    A, B, selected, scale, shift, bias = projection
    tokens, latent = coded[0].shape[0], scale.shape[0]
    group = group if coded[1].shape[1] > 1 else 0
    u = _product(coded[0], coded[1], A, selected, None, latent, True, group, torch.float32)
    codes, scales, _ = _room(u, tokens, latent, 1)
    wrap_triton(many.code_latents)[(tokens,)](u, scale, shift, codes, scales, latent, U=_power(latent))
    return _product(codes, scales, B, selected, bias, B.shape[2], False, 0, dtype)


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
    """(M, N): codes (M, K) times the digits of the selected primitives of A (`latent_side`) or B, scaled, + bias."""
    tokens, K = codes.shape
    count, rank = K // 16, packed.shape[2] if latent_side else 16 * packed.shape[1]
    if tokens >= PREFILL and not group and N % 8 == 0:
        digits = _new(codes, N, K, dtype=torch.int8)
        wrap_triton(many.unpack)[(triton.cdiv(N, 64), triton.cdiv(count, 8))](
            packed, selected, digits, count, rank, N, LATENT_SIDE=latent_side, BN=64, BW=8
        )
        y = torch._int_mm(codes, digits.T).float() * scales
        return (y if bias is None else y + bias).to(dtype)
    out = _new(codes, tokens, N, dtype=dtype)
    height = 16 if tokens <= 64 else 64
    wrap_triton(many.tile)[(triton.cdiv(tokens, height), triton.cdiv(N, 64))](
        codes, scales, packed, selected, bias, out,
        tokens, K, N, count, rank, scales.shape[1],
        LATENT_SIDE=latent_side, GROUPED=group > 0, BM=height, BN=64, BK=group or 128,
    )  # fmt: skip
    return out
