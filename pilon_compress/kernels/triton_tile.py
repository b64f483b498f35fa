"""Kernels for many tokens: quantisation is a launch of its own, products are integer tiles on tensor cores.

quantise_rows      x -> codes, a row per program          tile      codes x packed words -> floats
quantise_latents   u -> codes                             unpack    packed words -> int8 weights, for torch._int_mm
quantise_hidden    act(gate) · up -> codes

"Codes" are quantised activations, int8.
"""

import triton
import triton.language as tl

from pilon_compress.kernels.triton_arithmetic import activation, quantise_row, times
from pilon_compress.kernels.triton_gemv import quantise_group, quantise_latent, scaled


@triton.jit
def quantise_rows(x, codes, scales, sums, K, WIDTH, GROUPS, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Quantise x (M, K) into codes (M, WIDTH), scales and code sums (M, GROUPS). Grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    quantise_row(x + row * K, codes + row * WIDTH, scales + row * GROUPS, sums + row * GROUPS, K, WIDTH, GROUP, CHUNK)


@triton.jit
def quantise_latents(u, scale, shift, codes, scales, LATENT, U: tl.constexpr):
    """Scale and quantise the latent vectors u (M, LATENT). Grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, U)
    known = at < LATENT
    v = scaled(tl.load(u + row * LATENT + at, mask=known, other=0.0), scale, shift, at, known)
    s, total = quantise_latent(v, codes + row * LATENT, at, known)
    tl.store(scales + row, s)


@triton.jit
def quantise_hidden(
    gate, up, codes, scales, N, WIDTH, GATED: tl.constexpr, ACT: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Quantise act(up), or act(gate) · up, (M, N), into codes (M, WIDTH) and scales (M, groups). Grid (groups, M)."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    inside = n < N
    h = tl.load(up + row * N + n, mask=inside, other=0.0)
    if GATED:
        g = tl.load(gate + row * N + n, mask=inside, other=0.0)
        h = times(activation(g, ACT), h)
    else:
        h = activation(h, ACT)
    code, scale = quantise_group(h, inside)
    tl.store(codes + row * WIDTH + n, code.to(tl.int8), mask=n < WIDTH)
    tl.store(scales + row * tl.num_programs(0) + tl.program_id(0), scale)


@triton.jit
def offsets(selected, line, n, COUNT, RANK, N, LATENT_SIDE: tl.constexpr):
    """Return the offsets of the words of K-lines `line` and outputs `n`.

    LATENT_SIDE: in A (primitives, COUNT, RANK); otherwise in B (primitives, RANK / 16, N).
    """
    if LATENT_SIDE:
        column = tl.load(selected + n // RANK) * COUNT * RANK + n % RANK
        return line[:, None] * RANK + column[None, :]
    else:
        per = RANK // 16
        line = tl.load(selected + line // per) * per + line % per
        return line[:, None] * N + n[None, :]


@triton.jit
def weights(words):
    """Unpack words (BW, BN) into int8 weights (16 · BW, BN)."""
    place = tl.arange(0, 16)
    shift = 8 * (place % 4) + 2 * (place // 4)
    code = (words[:, None, :] >> shift[None, :, None]) & 3
    return tl.reshape(code.to(tl.int8) - 1, (words.shape[0] * 16, words.shape[1]))


@triton.jit
def tile(
    codes, scales, words, selected, bias, out,
    M, K, N, COUNT, RANK, GROUPS,
    LATENT_SIDE: tl.constexpr, GROUPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store out (M, N) = codes (M, K) · weights, scaled by scales (M, GROUPS), + bias. Grid (M / BM, N / BN).

    K is 16 · COUNT. GROUPED: BK inputs share a scale, and their scaled sums are added up in order.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.where(m < M, m, 0).to(tl.int64)
    column = tl.where(n < N, n, 0)
    k = tl.arange(0, BK)
    word = tl.arange(0, BK // 16)
    sums = tl.zeros((BM, BN), tl.int32)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x = tl.load(codes + row[:, None] * K + (start + k)[None, :], mask=(start + k < K)[None, :], other=0)
        line = tl.minimum(start // 16 + word, COUNT - 1)  # codes from K on are zero, so any word will do
        w = weights(tl.load(words + offsets(selected, line, column, COUNT, RANK, N, LATENT_SIDE)))
        if GROUPED:
            part = tl.dot(x, w, out_dtype=tl.int32).to(tl.float32)
            scale = tl.load(scales + row * GROUPS + start // BK)
            part = times(part, tl.broadcast_to(scale[:, None], part.shape))
            total = total + part
        else:
            sums += tl.dot(x, w, out_dtype=tl.int32)
    if not GROUPED:
        scale = tl.load(scales + row)
        total = times(sums.to(tl.float32), tl.broadcast_to(scale[:, None], total.shape))
    if bias is not None:
        total = total + tl.load(bias + column)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + row[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unpack(
    words, selected, out, COUNT, RANK, N,
    LATENT_SIDE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Store out (N, 16 · COUNT), the int8 weights of the selected primitives. Grid (N / BN, COUNT / BW)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    line = tl.program_id(1) * BW + tl.arange(0, BW)
    w = tl.load(
        words + offsets(selected, tl.minimum(line, COUNT - 1), tl.where(n < N, n, 0), COUNT, RANK, N, LATENT_SIDE)
    )
    k = tl.program_id(1) * BW * 16 + tl.arange(0, BW * 16)
    inside = (k < COUNT * 16)[:, None] & (n < N)[None, :]
    tl.store(out + n.to(tl.int64)[None, :] * (COUNT * 16) + k[:, None], weights(w), mask=inside)
