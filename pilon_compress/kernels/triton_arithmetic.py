"""Functions of all Triton kernels: integer products, quantisation, activations.

On a device some of it is PTX: `dp4a`, which Triton never chooses by itself, and a multiplication with explicit
rounding, which no compiler fuses with a following addition, whatever its options. The interpreter (TRITON_INTERPRET=1,
read when this file is imported) computes equal numbers with Triton's own operations.
"""

import triton
import triton.language as tl

EMULATED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LEVELS = tl.constexpr(127.0)
LEAST = tl.constexpr(1e-20)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has no bits behind the point, so it rounds to even
ACTIVATIONS = ("none", "relu", "relu2", "silu", "gelu", "gelu_tanh")  # kernels take the index


@triton.jit
def dp4a(a, b, c):
    """Add to `c` the products of the four unsigned bytes of `a` with the four signed bytes of `b`; all int32."""
    if EMULATED:
        for i in tl.static_range(4):
            c += ((a >> (8 * i)) & 0xFF) * ((b << (24 - 8 * i)) >> 24)
        return c
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def times(a, b):
    """Return the float32 product a · b, rounded before anything is added to it."""
    if EMULATED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def nearest(x):
    """Round float32 x to the nearest integer, halves to even, as int32; |x| < 2^22."""
    if EMULATED:
        return ((x + ROUND) - ROUND).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def steps(largest):
    """Return the factor that maps magnitude `largest` to 127, and the scale that undoes it.

    torch computes 127 / x as 127 times the reciprocal of x, which may differ in the last place; so does this.
    """
    largest = tl.maximum(largest, LEAST)
    one = tl.full(largest.shape, 1.0, tl.float32)
    return times(tl.div_rn(one, largest), LEVELS * one), tl.div_rn(largest, LEVELS * one)


@triton.jit
def activation(x, ACT: tl.constexpr):
    """Compute ACTIVATIONS[ACT] of x. Nothing in it can be fused, so that every kernel gets equal results."""
    if ACT == 0:
        return x
    elif ACT == 1:
        return tl.maximum(x, 0.0)
    elif ACT == 2:
        x = tl.maximum(x, 0.0)
        return times(x, x)
    elif ACT == 3:
        return tl.div_rn(x, 1.0 + tl.exp(-x))
    elif ACT == 4:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 (1 + tanh z) is the logistic function of 2 z
        cubed = times(0.044715 * x * x, x)
        return tl.div_rn(x, 1.0 + tl.exp(-1.5957691216057308 * (x + cubed)))


@triton.jit
def dot_words(acc, words, codes, word, mask):
    """Add to `acc` (BK, BN) the products of `words` (BK, BN), 16 stored weights each, with the codes at `word` (BK,).

    Weights are stored as weight + 1. Codes are read four at a time as int32: byte j, bit pair g is input 4 g + j.
    """
    codes = codes.to(tl.pointer_type(tl.int32), bitcast=True)
    for g in tl.static_range(4):
        four = tl.load(codes + word * 4 + g, mask=mask, other=0)
        acc = dp4a((words >> (2 * g)) & 0x03030303, tl.broadcast_to(four[:, None], acc.shape), acc)
    return acc


@triton.jit
def quantise_row(x, codes, scales, sums, K, WIDTH, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Quantise the row at `x` (K,) into `codes` (WIDTH, zeros from K on), with `scales` and code `sums` per group.

    GROUP 0: one scale for the row, computed in a first pass. A barrier makes the results visible to the whole program.
    """
    at = tl.arange(0, CHUNK)
    if GROUP == 0:
        largest = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, K, CHUNK):
            part = tl.load(x + start + at, mask=start + at < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(part))
        inverse, scale = steps(tl.max(largest, 0))
        total = tl.zeros((CHUNK,), tl.int32)
        for start in range(0, WIDTH, CHUNK):
            part = tl.load(x + start + at, mask=start + at < K, other=0.0).to(tl.float32)
            code = nearest(times(part, tl.broadcast_to(inverse, (CHUNK,))))
            total += code
            tl.store(codes + start + at, code.to(tl.int8), mask=start + at < WIDTH)
        tl.store(scales, scale)
        tl.store(sums, tl.sum(total, 0))
    else:
        ROWS: tl.constexpr = CHUNK // GROUP
        row = tl.arange(0, ROWS)
        for start in range(0, WIDTH, CHUNK):
            place = start + row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            part = tl.load(x + place, mask=place < K, other=0.0).to(tl.float32)
            inverse, scale = steps(tl.max(tl.abs(part), 1))
            code = nearest(times(part, tl.broadcast_to(inverse[:, None], (ROWS, GROUP))))
            tl.store(codes + place, code.to(tl.int8), mask=place < WIDTH)
            group = start // GROUP + row
            inside = group * GROUP < K
            tl.store(scales + group, scale, mask=inside)
            tl.store(sums + group, tl.sum(code, 1), mask=inside)
    tl.debug_barrier()
