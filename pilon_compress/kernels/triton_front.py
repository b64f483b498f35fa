"""Kernel for few tokens and small blocks: all of a feed-forward block up to the down projection's u in one launch.

front         x -> parts of the down projection's u; `triton_gemv.output` adds them up and computes y
"""

import triton
import triton.language as tl

from pilon_compress.kernels.triton_arithmetic import activation, dot_words, quantise_row, times
from pilon_compress.kernels.triton_gemv import composed, quantise_group, quantise_latent, scaled


@triton.jit
def latent_of_token(x_codes, x_scale, x_sum, words, selected, scale, shift, codes, COUNT, RANK, LATENT,
                 U: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Compute a token's complete latent vector and quantise it into `codes`; return the scale and the code sum."""
    at = tl.arange(0, U)
    known = at < LATENT
    columns = words + tl.load(selected + at // RANK, mask=known, other=0) * COUNT * RANK + at % RANK
    word = tl.arange(0, BK)
    acc = tl.zeros((BK, U), tl.int32)
    for start in range(0, COUNT, BK):
        line = start + word
        ok = line < COUNT
        w = tl.load(columns[None, :] + line[:, None] * RANK, mask=ok[:, None] & known[None, :], other=0)
        acc = dot_words(acc, w, x_codes, line, ok)
    u = (tl.sum(acc, 0) - x_sum).to(tl.float32)
    u = tl.where(known, times(u, tl.broadcast_to(x_scale, u.shape)), 0.0)
    return quantise_latent(scaled(u, scale, shift, at, known), codes, at, known)


@triton.jit
def front(
    x,
    gate_A, gate_B, gate_scale, gate_shift, gate_selected, gate_bias,
    up_A, up_B, up_scale, up_shift, up_selected, up_bias,
    down_A, down_selected, scratch, scales, sums, parts,
    K, WIDTH, N, H_WIDTH, GATE_LATENT, UP_LATENT, DOWN_LATENT, GATE_RANK, UP_RANK, DOWN_RANK, SCRATCH,
    GATED: tl.constexpr, ACT: tl.constexpr, GATE_U: tl.constexpr, UP_U: tl.constexpr, DOWN_U: tl.constexpr,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Store parts (M, groups, DOWN_LATENT): the summand of each group of hidden units in the down projection's u.

    Grid (groups, M). Every program computes the complete latent vectors of gate and up, and its own group of hidden
    units. scratch: (programs, SCRATCH) for codes of x, up, gate and h; scales and sums (programs,).
    """
    row, group = tl.program_id(1), tl.program_id(0)
    program = row * tl.num_programs(0) + group
    scratch += program.to(tl.int64) * SCRATCH
    quantise_row(x + row.to(tl.int64) * K, scratch, scales + program, sums + program, K, WIDTH, 0, CHUNK)
    n, up_codes = group * GROUP + tl.arange(0, GROUP), scratch + WIDTH
    h = hidden_units(
        scratch, scales + program, sums + program, up_A, up_B, up_scale, up_shift, up_selected, up_bias, up_codes,
        n, N, WIDTH // 16, UP_RANK, UP_LATENT, UP_U, BK, BW,
    )  # fmt: skip
    if GATED:
        gate = hidden_units(
            scratch, scales + program, sums + program, gate_A, gate_B, gate_scale, gate_shift, gate_selected, gate_bias,
            up_codes + UP_LATENT, n, N, WIDTH // 16, GATE_RANK, GATE_LATENT, GATE_U, BK, BW,
        )  # fmt: skip
        h = times(activation(gate, ACT), h)
    else:
        h = activation(h, ACT)
    code, h_scale = quantise_group(h, n < N)
    h_codes = up_codes + UP_LATENT + GATE_LATENT
    tl.store(h_codes + tl.arange(0, GROUP), code.to(tl.int8))
    tl.debug_barrier()
    down_part(
        h_codes, tl.sum(code, 0), h_scale, down_A, down_selected, parts + program.to(tl.int64) * DOWN_LATENT,
        group, H_WIDTH // 16, DOWN_RANK, DOWN_LATENT, GROUP, DOWN_U,
    )  # fmt: skip


@triton.jit
def hidden_units(
    x_codes, x_scale, x_sum, A, B, scale, shift, selected, bias, codes,
    n, N, COUNT, RANK, LATENT, U: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Return the hidden units `n` of one token by way of its complete latent vector, quantised into `codes`."""
    s, total = latent_of_token(
        x_codes, tl.load(x_scale), tl.load(x_sum), A, selected, scale, shift, codes, COUNT, RANK, LATENT, U, BK
    )  # fmt: skip
    return composed(codes, total, s, B, selected, bias, n, n < N, N, LATENT // 16, RANK // 16, BW)


@triton.jit
def down_part(
    codes, total, scale, A, selected, part, group, COUNT, RANK, LATENT, GROUP: tl.constexpr, U: tl.constexpr
):  # fmt: skip
    """Store part (LATENT,): the summand of hidden group `group` in u. `codes` (GROUP,) have sum `total` and `scale`."""
    at = tl.arange(0, U)
    known = at < LATENT
    word = tl.arange(0, GROUP // 16)
    line = group * (GROUP // 16) + word
    ok = line < COUNT
    columns = A + tl.load(selected + at // RANK, mask=known, other=0) * COUNT * RANK + at % RANK
    w = tl.load(columns[None, :] + line[:, None] * RANK, mask=ok[:, None] & known[None, :], other=0)
    acc = dot_words(tl.zeros((GROUP // 16, U), tl.int32), w, codes, word, ok)
    u = (tl.sum(acc, 0) - total).to(tl.float32)
    tl.store(part + at, times(u, tl.broadcast_to(scale, u.shape)), mask=known)
