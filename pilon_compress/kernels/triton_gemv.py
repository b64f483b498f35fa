"""Few tokens: one program per token and slice of the outputs, products with dp4a, quantisation inside.

    latent        x -> u           quantises x, or takes codes that `hidden` has made
    output        u -> y           adds up the parts of u in order, scales, quantises, multiplies
    hidden        u -> h           the same, then activation and gate; leaves h as codes, scales and code sums
    front         x -> parts of the down projection's u: everything up to there in one launch

Latent columns lie side by side over the selected primitives: k·r of them. A program that needs codes writes them to a
piece of memory of its own and reads them back, because only there can every lane reach all of them.
"""

import triton
import triton.language as tl

from pilon_compress.kernels.triton_arithmetic import activation, code_row, fold_words, nearest, steps, times


@triton.jit
def code_latent(v, codes, at, inside):
    """Quantise the vector `v`, one scale; returns the scale and the sum of the codes."""
    inverse, scale = steps(tl.max(tl.abs(v), 0))
    code = nearest(times(v, tl.broadcast_to(inverse, v.shape)))
    tl.store(codes + at, code.to(tl.int8), mask=inside)
    tl.debug_barrier()
    return scale, tl.sum(code, 0)


@triton.jit
def scaled(v, scale, shift, at, inside):
    """What a latent vector becomes before it is quantised; zero outside. `shift` may be None."""
    v = times(v, tl.load(scale + at, mask=inside, other=0.0))
    if shift is not None:
        v = v + tl.load(shift + at, mask=inside, other=0.0)
    return v


@triton.jit
def composed(codes, total, s, words, selected, bias, n, inside, N, COUNT, PER, BK: tl.constexpr):
    """Outputs `n` (BN,) of the selected primitives from the latent codes; `total` is their sum, `s` their scale.

    words (primitives, PER, N); COUNT words of codes. `bias` may be None.
    """
    word = tl.arange(0, BK)
    acc = tl.zeros((BK, n.shape[0]), tl.int32)
    for start in range(0, COUNT, BK):
        at = start + word
        ok = at < COUNT
        line = tl.load(selected + at // PER, mask=ok, other=0) * PER + at % PER
        w = tl.load(words + line[:, None] * N + n[None, :], mask=ok[:, None] & inside[None, :], other=0)
        acc = fold_words(acc, w, codes, at, ok)
    y = (tl.sum(acc, 0) - total).to(tl.float32)
    y = times(y, tl.broadcast_to(s, y.shape))
    if bias is not None:
        y = y + tl.load(bias + n, mask=inside, other=0.0)
    return y


@triton.jit
def from_parts(
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
    """Outputs `n` from the latent parts (PARTS, LATENT) of one token, which are added up in their order."""
    at = tl.arange(0, U)
    known = at < LATENT
    v = tl.load(parts + at, mask=known, other=0.0)
    for part in range(1, PARTS):
        v = v + tl.load(parts + part * LATENT + at, mask=known, other=0.0)
    s, total = code_latent(scaled(v, scale, shift, at, known), codes, at, known)
    return composed(codes, total, s, words, selected, bias, n, inside, N, LATENT // 16, PER, BK)


@triton.jit
def latent(
    x, codes, scales, sums, products, words, selected, other_words, other_selected, out,
    K, WIDTH, RANK, LATENT, GROUPS,
    CODED: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (banks, M, LATENT) = x · A, scaled by the activations' scales. Grid (LATENT / BN, M, banks), BN divides RANK.

    One bank, or two of the same shape (gate and up), of words (primitives, WIDTH / 16, RANK). CODED: codes (M, WIDTH),
    scales and sums (M, GROUPS) are given; otherwise they are memory to write on, one row per program, and x (M, K) is
    quantised. products: (programs, GROUPS · BN).
    """
    row = tl.program_id(1)
    bank = tl.program_id(2)
    line = bank * tl.num_programs(1) + row
    program = line * tl.num_programs(0) + tl.program_id(0)
    if bank == 1:
        words = other_words
        selected = other_selected
    mine = row if CODED else program
    codes += mine.to(tl.int64) * WIDTH
    scales += mine * GROUPS
    sums += mine * GROUPS
    if not CODED:
        code_row(x + row.to(tl.int64) * K, codes, scales, sums, K, WIDTH, GROUP, CHUNK)
    first = tl.program_id(0) * BN
    lane = tl.arange(0, BN)
    words += tl.load(selected + first // RANK) * (WIDTH // 16) * RANK + first % RANK
    word = tl.arange(0, BK)
    out += line.to(tl.int64) * LATENT + first + lane
    if GROUP == 0:
        acc = tl.zeros((BK, BN), tl.int32)
        for start in range(0, WIDTH // 16, BK):
            at = start + word
            ok = at < WIDTH // 16
            w = tl.load(words + at[:, None] * RANK + lane[None, :], mask=ok[:, None], other=0)
            acc = fold_words(acc, w, codes, at, ok)
        u = (tl.sum(acc, 0) - tl.load(sums)).to(tl.float32)
        tl.store(out, times(u, tl.broadcast_to(tl.load(scales), u.shape)))
    else:
        PER: tl.constexpr = GROUP // 16
        ROWS: tl.constexpr = BK // PER
        products += program.to(tl.int64) * GROUPS * BN + lane
        for start in range(0, WIDTH // 16, BK):
            at = start + word
            ok = at < WIDTH // 16
            w = tl.load(words + at[:, None] * RANK + lane[None, :], mask=ok[:, None], other=0)
            acc = fold_words(tl.zeros((BK, BN), tl.int32), w, codes, at, ok)
            group = start // PER + tl.arange(0, ROWS)
            known = group < GROUPS
            whole = tl.sum(tl.reshape(acc, (ROWS, PER, BN)), 1) - tl.load(sums + group, mask=known, other=0)[:, None]
            scale = tl.load(scales + group, mask=known, other=0.0)
            part = times(whole.to(tl.float32), tl.broadcast_to(scale[:, None], (ROWS, BN)))
            tl.store(products + group[:, None] * BN, part, mask=known[:, None])
        tl.debug_barrier()
        u = tl.load(products)
        for group in tl.range(1, GROUPS, loop_unroll_factor=8):
            u = u + tl.load(products + group * BN)
        tl.store(out, u)


@triton.jit
def output(
    parts, scale, shift, codes, words, selected, bias, out,
    N, LATENT, PER, PARTS,
    U: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (M, N) from the latent parts (M, PARTS, LATENT). Grid (N / BN, M); codes: (programs, LATENT) to write on."""
    row = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    codes += (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * LATENT
    parts += row.to(tl.int64) * PARTS * LATENT
    y = from_parts(
        parts, scale, shift, codes, words, selected, bias, n, inside, N, LATENT, PER, PARTS, U, BK
    )  # fmt: skip
    tl.store(out + row.to(tl.int64) * N + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def code_group(h, inside):
    """One group of hidden activations as codes, zero outside, and their scale."""
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
    """Codes (M, WIDTH) with their scales and sums (M, groups) of h = act(up), or act(gate) · up. Grid (groups, M).

    N hidden units, WIDTH with the zeros behind them. scratch: (programs, GATE_LATENT + UP_LATENT).
    """
    row = tl.program_id(1)
    program = row * tl.num_programs(0) + tl.program_id(0)
    n = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    inside = n < N
    scratch += program.to(tl.int64) * (GATE_LATENT + UP_LATENT)
    h = from_parts(
        up_parts + row.to(tl.int64) * UP_LATENT, up_scale, up_shift, scratch, up_words, up_selected, up_bias,
        n, inside, N, UP_LATENT, UP_PER, 1, UP_U, BK,
    )  # fmt: skip
    if GATED:
        gate = from_parts(
            gate_parts + row.to(tl.int64) * GATE_LATENT, gate_scale, gate_shift, scratch + UP_LATENT, gate_words,
            gate_selected, gate_bias, n, inside, N, GATE_LATENT, GATE_PER, 1, GATE_U, BK,
        )  # fmt: skip
        h = times(activation(gate, ACT), h)
    else:
        h = activation(h, ACT)
    code, scale = code_group(h, inside)
    tl.store(codes + row.to(tl.int64) * WIDTH + n, code.to(tl.int8), mask=n < WIDTH)
    tl.store(scales + program, scale)
    tl.store(sums + program, tl.sum(code, 0))


@triton.jit
def whole_latent(x_codes, x_scale, x_sum, words, selected, scale, shift, codes, COUNT, RANK, LATENT,
                 U: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """All of a token's latent vector, quantised into `codes`; returns its scale and code sum."""
    at = tl.arange(0, U)
    known = at < LATENT
    columns = words + tl.load(selected + at // RANK, mask=known, other=0) * COUNT * RANK + at % RANK
    word = tl.arange(0, BK)
    acc = tl.zeros((BK, U), tl.int32)
    for start in range(0, COUNT, BK):
        line = start + word
        ok = line < COUNT
        w = tl.load(columns[None, :] + line[:, None] * RANK, mask=ok[:, None] & known[None, :], other=0)
        acc = fold_words(acc, w, x_codes, line, ok)
    u = (tl.sum(acc, 0) - x_sum).to(tl.float32)
    u = tl.where(known, times(u, tl.broadcast_to(x_scale, u.shape)), 0.0)
    return code_latent(scaled(u, scale, shift, at, known), codes, at, known)


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
    """parts (M, groups, DOWN_LATENT): what each group of hidden units adds to the down projection's latent vector.

    Grid (groups, M). Every program computes the whole latent vector of gate and up, and its own group of hidden units.
    scratch: (programs, SCRATCH) codes of x, up, gate and h; scales and sums (programs,).
    """
    row = tl.program_id(1)
    group = tl.program_id(0)
    program = row * tl.num_programs(0) + group
    scratch += program.to(tl.int64) * SCRATCH
    code_row(x + row.to(tl.int64) * K, scratch, scales + program, sums + program, K, WIDTH, 0, CHUNK)
    x_scale = tl.load(scales + program)
    x_sum = tl.load(sums + program)
    lane = tl.arange(0, GROUP)
    n = group * GROUP + lane
    inside = n < N
    up_codes = scratch + WIDTH
    s, total = whole_latent(
        scratch, x_scale, x_sum, up_A, up_selected, up_scale, up_shift, up_codes, WIDTH // 16, UP_RANK, UP_LATENT,
        UP_U, BK,
    )  # fmt: skip
    h = composed(
        up_codes, total, s, up_B, up_selected, up_bias, n, inside, N, UP_LATENT // 16, UP_RANK // 16, BW
    )  # fmt: skip
    if GATED:
        gate_codes = up_codes + UP_LATENT
        s, total = whole_latent(
            scratch, x_scale, x_sum, gate_A, gate_selected, gate_scale, gate_shift, gate_codes, WIDTH // 16, GATE_RANK,
            GATE_LATENT, GATE_U, BK,
        )  # fmt: skip
        gate = composed(
            gate_codes, total, s, gate_B, gate_selected, gate_bias, n, inside, N, GATE_LATENT // 16, GATE_RANK // 16, BW
        )  # fmt: skip
        h = times(activation(gate, ACT), h)
    else:
        h = activation(h, ACT)
    code, h_scale = code_group(h, inside)
    h_codes = up_codes + UP_LATENT + GATE_LATENT
    tl.store(h_codes + lane, code.to(tl.int8))
    tl.debug_barrier()
    at = tl.arange(0, DOWN_U)
    known = at < DOWN_LATENT
    word = tl.arange(0, GROUP // 16)
    line = group * (GROUP // 16) + word
    ok = line < H_WIDTH // 16
    columns = tl.load(down_selected + at // DOWN_RANK, mask=known, other=0) * (H_WIDTH // 16) * DOWN_RANK
    columns = down_A + columns + at % DOWN_RANK
    w = tl.load(columns[None, :] + line[:, None] * DOWN_RANK, mask=ok[:, None] & known[None, :], other=0)
    acc = fold_words(tl.zeros((GROUP // 16, DOWN_U), tl.int32), w, h_codes, word, ok)
    u = (tl.sum(acc, 0) - tl.sum(code, 0)).to(tl.float32)
    tl.store(parts + program.to(tl.int64) * DOWN_LATENT + at, times(u, tl.broadcast_to(h_scale, u.shape)), mask=known)
