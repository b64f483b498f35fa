"""The Triton kernels put together: torch operators for one projection and for a feed-forward block.

An operator takes a projection as a list: A, B, selected, scale, shift or None, bias or None (see gpu.Projection).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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

Coded = tuple[Tensor, Tensor, Tensor]  # codes (M, WIDTH) int8, scales (M, groups), code sums (M, groups)


class Parts(NamedTuple):
    """A projection as it goes through the operators."""

    A: Tensor
    B: Tensor
    selected: Tensor
    scale: Tensor
    shift: Tensor | None
    bias: Tensor | None


def _parts(given: Sequence[Tensor | None]) -> Parts:
    return Parts(*given)  # type: ignore[arg-type]


def wrap_triton(kernel: Any) -> Any:
    """torch's wrap_triton; the interpreter's kernels run as they are."""
    return kernel if EMULATED else torch.library.wrap_triton(kernel)


@torch.library.triton_op("pilon_gpu::project", mutates_args=())
def project(x: Tensor, projection: Sequence[Tensor | None], group: int) -> Tensor:
    parts, rows = _parts(projection), x.reshape(-1, x.shape[-1]).contiguous()
    tokens = rows.shape[0]
    if tokens == 0:
        y = x.new_empty(0, parts.B.shape[2])
    elif tokens <= FEW:
        y = _output(_latent(rows, None, parts, None, group).view(tokens, 1, -1), parts, x.dtype)
    else:
        y = _tiled(_code(rows, parts.A, group), parts, group, x.dtype)
    return y.reshape(*x.shape[:-1], parts.B.shape[2])


@project.register_fake
def _(x: Tensor, projection: Sequence[Tensor | None], group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], _parts(projection).B.shape[2])


@torch.library.triton_op("pilon_gpu::linear", mutates_args=())
def linear(x: Tensor, words: Tensor, selected: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """A matrix as one primitive: its outputs are the latent vector, which is scaled and not quantised."""
    rows, one = x.reshape(-1, x.shape[-1]).contiguous(), Parts(words, words, selected, scale, None, None)
    tokens, d_out = rows.shape[0], scale.shape[0]
    if tokens == 0:
        y = x.new_empty(0, d_out, dtype=torch.float32)
    elif tokens <= FEW:
        y = _latent(rows, None, one, None, group).view(tokens, d_out)
    else:
        y = _latent_tiled(_code(rows, words, group), one, group)
    y = y * scale
    return (y if bias is None else y + bias).to(x.dtype).reshape(*x.shape[:-1], d_out)


@linear.register_fake
def _(x: Tensor, words: Tensor, selected: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


@torch.library.triton_op("pilon_gpu::ffn", mutates_args=())
def ffn(
    x: Tensor,
    gate: Sequence[Tensor | None],
    up: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    act: int,
) -> Tensor:
    first, last, gating = _parts(up), _parts(down), _parts(gate) if gate else None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = rows.shape[0]
    number = launches(tokens, gating, first)
    if tokens == 0:
        y = x.new_empty(0, last.B.shape[2])
    elif number == 2:
        y = _output(_front(rows, gating, first, last, act), last, x.dtype)
    elif number:
        coded = _hidden(rows, gating, first, last.A.shape[1], act)
        u = _latent(rows.new_empty(0, first.B.shape[2]), coded, last, None, GROUP)
        y = _output(u.view(tokens, 1, -1), last, x.dtype)
    else:
        coded = _code(rows, first.A, 0)
        y_up = _tiled(coded, first, 0, torch.float32)
        y_gate = None if gating is None else _tiled(coded, gating, 0, torch.float32)
        y = _tiled(_code_hidden(y_gate, y_up, last.A.shape[1], act), last, GROUP, x.dtype)
    return y.reshape(*x.shape[:-1], last.B.shape[2])


@ffn.register_fake
def _(
    x: Tensor,
    gate: Sequence[Tensor | None],
    up: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    act: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _parts(down).B.shape[2])


def launches(tokens: int, gate: Parts | None, up: Parts) -> int:
    """How many launches a feed-forward block of so many tokens takes: 2, 4 or 5; 0: projection by projection."""
    if tokens > FEW:
        return 0
    firsts = [up] if gate is None else [gate, up]
    if sum(4 * part.scale.shape[0] * part.A.shape[1] for part in firsts) <= SMALL:
        return 2
    return 4 if _alike(gate, up) else 5


def _alike(gate: Parts | None, up: Parts) -> bool:
    """Whether one launch can compute the latent vectors of both (or there is but one)."""
    return gate is None or (gate.A.shape[2] == up.A.shape[2] and gate.scale.shape == up.scale.shape)


def _power(number: int) -> int:
    return max(16, triton.next_power_of_2(number))


def _new(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _result(x: Tensor, tokens: int, N: int, dtype: torch.dtype) -> Tensor:
    """Room for results in `dtype`. The interpreter cuts bfloat16 off instead of rounding, so it gets float32."""
    return _new(x, tokens, N, dtype=torch.float32 if EMULATED else dtype)


def _latent(x: Tensor, coded: Coded | None, parts: Parts, other: Parts | None, group: int) -> Tensor:
    """u (banks, M, k·r) of x (M, d_in), or of codes; with `other`, a projection of the same shape, two banks."""
    count, rank = parts.A.shape[1:]
    latent = parts.scale.shape[0]
    d_in, width, columns = x.shape[1], 16 * count, 32 if rank % 32 == 0 else 16  # columns of one primitive
    group = group if group < d_in else 0
    groups = -(-d_in // group) if group else 1
    tokens = x.shape[0] if coded is None else coded[0].shape[0]
    banks, second = (1, parts) if other is None else (2, other)
    programs = banks * tokens * (latent // columns)
    codes, scales, sums = coded or _room(x, programs, width, groups)
    out = _new(x, banks, tokens, latent)
    wrap_triton(few.latent)[(latent // columns, tokens, banks)](
        x, codes, scales, sums, _new(x, programs if group else 1, groups * columns),
        parts.A, parts.selected, second.A, second.selected, out,
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


def _output(latents: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
    """y (M, d_out) of the parts of the latent vectors, (M, groups, k·r)."""
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


def _hidden(x: Tensor, gate: Parts | None, up: Parts, count: int, act: int) -> Coded:
    """The hidden activations of x (M, d_in) as codes (M, 16 · count): two launches, three if the banks differ."""
    if _alike(gate, up):
        u = _latent(x, None, up, gate, 0).unbind()
    else:
        u = tuple(_latent(x, None, part, None, 0).squeeze(0) for part in (up, gate) if part)
    side = gate or up
    tokens, latent, gate_latent, N = x.shape[0], up.scale.shape[0], side.scale.shape[0], up.B.shape[2]
    groups = triton.cdiv(N, GROUP)
    codes, scales, sums = _room(x, tokens, 16 * count, groups)
    wrap_triton(few.hidden)[(groups, tokens)](
        u[-1], side.scale, side.shift, side.B, side.selected, side.bias,
        u[0], up.scale, up.shift, up.B, up.selected, up.bias,
        _new(x, tokens * groups, gate_latent + latent, dtype=torch.int8), codes, scales, sums,
        N, 16 * count, gate_latent, latent, side.B.shape[1], up.B.shape[1],
        GATED=gate is not None, ACT=act, GATE_U=_power(gate_latent), UP_U=_power(latent), GROUP=GROUP, BK=16,
        num_warps=8,
    )  # fmt: skip
    return codes, scales, sums


def _front(x: Tensor, gate: Parts | None, up: Parts, down: Parts, act: int) -> Tensor:
    """The parts (M, groups, k·r) of the down projection's latent vector, one per group of hidden units: one launch."""
    side = gate or up
    latent, gate_latent, down_latent = (part.scale.shape[0] for part in (up, side, down))
    width, N, tokens = 16 * up.A.shape[1], up.B.shape[2], x.shape[0]
    groups, room = triton.cdiv(N, GROUP), width + latent + gate_latent + GROUP
    scratch, scales, sums = _room(x, tokens * groups, room, 1)
    out = _new(x, tokens, groups, down_latent)
    wrap_triton(few.front)[(groups, tokens)](
        x,
        side.A, side.B, side.scale, side.shift, side.selected, side.bias,
        up.A, up.B, up.scale, up.shift, up.selected, up.bias,
        down.A, down.selected, scratch, scales, sums, out,
        x.shape[1], width, N, 16 * down.A.shape[1], gate_latent, latent, down_latent,
        side.A.shape[2], up.A.shape[2], down.A.shape[2], room,
        GATED=gate is not None, ACT=act, GATE_U=_power(gate_latent), UP_U=_power(latent), DOWN_U=_power(down_latent),
        GROUP=GROUP, CHUNK=CHUNK, BK=16, BW=16, num_warps=8,
    )  # fmt: skip
    return out


def _code(x: Tensor, A: Tensor, group: int) -> Coded:
    """x (M, d_in) quantised."""
    (tokens, d_in), count = x.shape, A.shape[1]
    group = group if group < d_in else 0
    coded = _room(x, tokens, 16 * count, -(-d_in // group) if group else 1)
    wrap_triton(many.code_rows)[(tokens,)](
        x, *coded, d_in, 16 * count, coded[1].shape[1], GROUP=group, CHUNK=CHUNK
    )  # fmt: skip
    return coded


def _code_hidden(gate: Tensor | None, up: Tensor, count: int, act: int) -> Coded:
    """act(up), or act(gate) · up, (M, N) as codes (M, 16 · count)."""
    tokens, N = up.shape
    groups = triton.cdiv(N, GROUP)
    coded = _room(up, tokens, 16 * count, groups)
    wrap_triton(many.code_hidden)[(groups, tokens)](
        gate, up, *coded[:2], N, 16 * count, GATED=gate is not None, ACT=act, GROUP=GROUP, num_warps=1
    )  # fmt: skip
    return coded


def _tiled(coded: Coded, parts: Parts, group: int, dtype: torch.dtype) -> Tensor:
    """y (M, d_out) of codes (M, WIDTH), which have one scale or one for each `group`."""
    tokens, latent = coded[0].shape[0], parts.scale.shape[0]
    u = _latent_tiled(coded, parts, group)
    codes, scales, _ = _room(u, tokens, latent, 1)
    wrap_triton(many.code_latents)[(tokens,)](u, parts.scale, parts.shift, codes, scales, latent, U=_power(latent))
    return _product(codes, scales, parts.B, parts.selected, parts.bias, parts.B.shape[2], False, 0, dtype)


def _latent_tiled(coded: Coded, parts: Parts, group: int) -> Tensor:
    """u (M, k·r), as `_latent`."""
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
    out = _result(codes, tokens, N, dtype)
    height = 16 if tokens <= 64 else 64
    wrap_triton(many.tile)[(triton.cdiv(tokens, height), triton.cdiv(N, 64))](
        codes, scales, packed, selected, bias, out,
        tokens, K, N, count, rank, scales.shape[1],
        LATENT_SIDE=latent_side, GROUPED=group > 0, BM=height, BN=64, BK=group or 128,
    )  # fmt: skip
    return out.to(dtype)
