"""Kernels: fast ternary and 8-bit products. They know digits and scales, nothing of models.

Reading order:

    reference.py   the arithmetic in plain torch: what every kernel must reproduce, bit for bit
    choose.py      what packed models call: which kernel runs, by device and shape
    tiles.py       how digits are packed on a CPU: two bits each, in blocks of 16 outputs by 8 inputs
    cpu.py         project, ffn, both prepared for many calls, and int8_linear; the kernel where it can be had
    build.py       one library for every CPU, compiled on first use, or made beforehand for a wheel
    ternary.cpp    the kernel: loops.h is its inner part, isa_*.h the instruction sets, operators.h what torch sees
    words.py       how digits are packed on a GPU: 16 in a word
    gpu.py         the same for GPUs, in Triton: triton_gemv.py few tokens, triton_tile.py more, triton_launch.py which,
                   triton_arithmetic.py what they share
"""
