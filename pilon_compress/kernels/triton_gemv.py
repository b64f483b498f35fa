"""Kernels for few tokens: one program per token and slice of the outputs, products with dp4a, quantisation inside.

    latent        x -> u           quantises x, or takes the codes that `hidden` stored
    output        u -> y           adds up the parts of u in order, scales, quantises, multiplies
    hidden        u -> h           like output, then activation and gate; stores h as codes, scales and code sums

The latent vector concatenates the selected primitives: k·r columns. "Codes" are quantised activations, int8. A program
writes its codes to global memory of its own and reads them back, because only there can every lane reach all of them.
"""

import triton
import triton.language as tl

from pilon_compress.kernels.triton_arithmetic import activation, dot_words, nearest, quantise_row, steps, times


@triton.jit
def quantise_latent(v, codes, at, inside):
    """Quantise the vector `v` into `codes` with one scale; return the scale and the sum of the codes."""
    inverse, scale = steps(tl.max(tl.abs(v), 0))
    code = nearest(times(v, tl.broadcast_to(inverse, v.shape)))
    tl.store(codes + at, code.to(tl.int8), mask=inside)
    tl.debug_barrier()
    return scale, tl.sum(code, 0)


@triton.jit
def scaled(v, scale, shift, at, inside):
    """Return v · scale + shift, a latent vector ready to be quantised; zero outside. `shift` may be None."""
    v = times(v, tl.load(scale + at, mask=inside, other=0.0))
    if shift is not None:
        v = v + tl.load(shift + at, mask=inside, other=0.0)
    return v


@triton.jit
def composed(codes, total, s, words, selected, bias, n, inside, N, COUNT, PER, BK: tl.constexpr):
    """Return the outputs `n` (BN,) of the selected primitives from latent `codes` with sum `total` and scale `s`.

    words (primitives, PER, N); the codes fill COUNT words. `bias` may be None.
    """
    word = tl.arange(0, BK)
    acc = tl.zeros((BK, n.shape[0]), tl.int32)
    for start in range(0, COUNT, BK):
        at = start + word
        ok = at < COUNT
        line = tl.load(selected + at // PER, mask=ok, other=0) * PER + at % PER
        w = tl.load(words + line[:, None] * N + n[None, :], mask=ok[:, None] & inside[None, :], other=0)
        acc = dot_words(acc, w, codes, at, ok)
    y = (tl.sum(acc, 0) - total).to(tl.float32)
    y = times(y, tl.broadcast_to(s, y.shape))
    if bias is not None:
        y = y + tl.load(bias + n, mask=inside, other=0.0)
    return y


@triton.jit
def outputs_of_parts(
    parts,
    scale,
    shift,
    codes,
    words,
    selected,
    bias,
    n,
    inside,
    N,
    LATENT,
    PER,
    PARTS,
    U: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the outputs `n` from the latent `parts` (PARTS, LATENT) of one token, added up in order."""
    at = tl.arange(0, U)
    known = at < LATENT
    v = tl.load(parts + at, mask=known, other=0.0)
    for part in range(1, PARTS):
        v = v + tl.load(parts + part * LATENT + at, mask=known, other=0.0)
    s, total = quantise_latent(scaled(v, scale, shift, at, known), codes, at, known)
    return composed(codes, total, s, words, selected, bias, n, inside, N, LATENT // 16, PER, BK)


@triton.jit
def latent(
    x, codes, scales, sums, products, words, selected, other_words, other_selected, out,
    K, WIDTH, RANK, LATENT, GROUPS,
    CODED: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store out (banks, M, LATENT) = x · A, scaled by the activations' scales. Grid (LATENT / BN, M, banks).

    One bank, or two of equal shape (gate and up), of words (primitives, WIDTH / 16, RANK); BN divides RANK. CODED:
    codes (M, WIDTH), scales and sums (M, GROUPS) are inputs; otherwise they are scratch, one row per program, and x
    (M, K) is quantised. products: scratch (programs, GROUPS · BN).
    """
    row = tl.program_id(1)
    bank = tl.program_id(2)
    line = bank * tl.num_programs(1) + row
    program = line * tl.num_programs(0) + tl.program_id(0)
    if bank == 1:
        words = other_words
        selected = other_selected
    coded_row = row if CODED else program
    codes += coded_row.to(tl.int64) * WIDTH
    scales += coded_row * GROUPS
    sums += coded_row * GROUPS
    if not CODED:
        quantise_row(x + row.to(tl.int64) * K, codes, scales, sums, K, WIDTH, GROUP, CHUNK)
    first = tl.program_id(0) * BN
    lane = tl.arange(0, BN)
    words += tl.load(selected + first // RANK) * (WIDTH // 16) * RANK + first % RANK
    out += line.to(tl.int64) * LATENT + first + lane
    if GROUP == 0:
        u = columns_of_row(codes, scales, sums, words, lane, WIDTH // 16, RANK, BK)
    else:
        products += program.to(tl.int64) * GROUPS * BN + lane
        u = columns_of_groups(codes, scales, sums, products, words, lane, WIDTH // 16, RANK, GROUPS, GROUP, BK)
    tl.store(out, u)


@triton.jit
def columns_of_row(codes, scales, sums, words, lane, COUNT, RANK, BK: tl.constexpr):
    """Return the latent columns `lane` (BN,) of one token whose COUNT words of codes have one scale."""
    word = tl.arange(0, BK)
    acc = tl.zeros((BK, lane.shape[0]), tl.int32)
    for start in range(0, COUNT, BK):
        at = start + word
        ok = at < COUNT
        w = tl.load(words + at[:, None] * RANK + lane[None, :], mask=ok[:, None], other=0)
        acc = dot_words(acc, w, codes, at, ok)
    u = (tl.sum(acc, 0) - tl.load(sums)).to(tl.float32)
    return times(u, tl.broadcast_to(tl.load(scales), u.shape))


@triton.jit
def columns_of_groups(
    codes, scales, sums, products, words, lane, COUNT, RANK, GROUPS, GROUP: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Return the latent columns `lane` (BN,) of one token with GROUPS scales; the groups are added up in order.

    products: scratch (GROUPS, BN), already offset by `lane`.
    """
    PER: tl.constexpr = GROUP // 16
    ROWS: tl.constexpr = BK // PER
    BN: tl.constexpr = lane.shape[0]
    word = tl.arange(0, BK)
    for start in range(0, COUNT, BK):
        at = start + word
        ok = at < COUNT
        w = tl.load(words + at[:, None] * RANK + lane[None, :], mask=ok[:, None], other=0)
        acc = dot_words(tl.zeros((BK, BN), tl.int32), w, codes, at, ok)
        group = start // PER + tl.arange(0, ROWS)
        known = group < GROUPS
        total = tl.sum(tl.reshape(acc, (ROWS, PER, BN)), 1) - tl.load(sums + group, mask=known, other=0)[:, None]
        scale = tl.load(scales + group, mask=known, other=0.0)
        part = times(total.to(tl.float32), tl.broadcast_to(scale[:, None], (ROWS, BN)))
        tl.store(products + group[:, None] * BN, part, mask=known[:, None])
    tl.debug_barrier()
    u = tl.load(products)
    for group in tl.range(1, GROUPS, loop_unroll_factor=8):
        u = u + tl.load(products + group * BN)
    return u


@triton.jit
def output(
    parts, scale, shift, codes, words, selected, bias, out,
    N, LATENT, PER, PARTS,
    U: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store out (M, N) of the latent parts (M, PARTS, LATENT). Grid (N / BN, M). codes: scratch (programs, LATENT)."""
    row = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    codes += (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * LATENT
    parts += row.to(tl.int64) * PARTS * LATENT
    y = outputs_of_parts(
        parts, scale, shift, codes, words, selected, bias, n, inside, N, LATENT, PER, PARTS, U, BK
    )  # fmt: skip
    tl.store(out + row.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantise_group(h, inside):
    """Quantise one group of hidden activations; return the codes, zero outside, and their scale."""
    h = tl.where(inside, h, 0.0)
    inverse, scale = steps(tl.max(tl.abs(h), 0))
    return nearest(times(h, tl.broadcast_to(inverse, h.shape))), scale


@triton.jit
def hidden(
    gate_parts, gate_scale, gate_shift, gate_words, gate_selected, gate_bias,
    up_parts, up_scale, up_shift, up_words, up_selected, up_bias,
    scratch, codes, scales, sums,
    N, WIDTH, GATE_LATENT, UP_LATENT, GATE_PER, UP_PER,
    GATED: tl.constexpr, ACT: tl.constexpr, GATE_U: tl.constexpr, UP_U: tl.constexpr, GROUP: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Store codes (M, WIDTH), scales and sums (M, groups) of h = act(up), or act(gate) · up. Grid (groups, M).

    N hidden units, WIDTH with padding. scratch: (programs, GATE_LATENT + UP_LATENT).
    """
    row = tl.program_id(1)
    program = row * tl.num_programs(0) + tl.program_id(0)
    n = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    inside = n < N
    scratch += program.to(tl.int64) * (GATE_LATENT + UP_LATENT)
    h = outputs_of_parts(
        up_parts + row.to(tl.int64) * UP_LATENT, up_scale, up_shift, scratch, up_words, up_selected, up_bias,
        n, inside, N, UP_LATENT, UP_PER, 1, UP_U, BK,
    )  # fmt: skip
    if GATED:
        gate = outputs_of_parts(
            gate_parts + row.to(tl.int64) * GATE_LATENT, gate_scale, gate_shift, scratch + UP_LATENT, gate_words,
            gate_selected, gate_bias, n, inside, N, GATE_LATENT, GATE_PER, 1, GATE_U, BK,
        )  # fmt: skip
        h = times(activation(gate, ACT), h)
    else:
        h = activation(h, ACT)
    code, scale = quantise_group(h, inside)
    tl.store(codes + row.to(tl.int64) * WIDTH + n, code.to(tl.int8), mask=n < WIDTH)
    tl.store(scales + program, scale)
    tl.store(sums + program, tl.sum(code, 0))
