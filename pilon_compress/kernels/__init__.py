"""Kernels: products with ternary and integer weights as they are stored. They import nothing of models.

Reading order:

    reference.py    the arithmetic in plain torch, which every kernel reproduces bit for bit
    dispatch.py     the entry for packed models: picks a backend by device and shape
    cpu_layout.py   ternary weights packed for CPUs: two bits each, in blocks of 16 outputs by 8 inputs
    cpu.py          project, ffn (each also prepared for many calls) and int8_linear, by the compiled kernel or torch
    integer_layout.py, integers.py
                    the same for integers of 8, 4, 3 and 2 bits: words of 32 bits, in tiles of 16 outputs
    build.py        compiles the kernel library on first use, or beforehand for a wheel
    products.cpp    the kernels: loops.h (ternary) and integer_loops.h are their inner parts, isa_*.h the instruction
                    sets; projections.h and integers.h share work out to threads; operators.h and integer_operators.h
                    make torch operators of them
    gpu_layout.py   ternary weights packed for GPUs: 16 in an int32 word
    gpu.py          projections and blocks by Triton: triton_gemv.py and triton_front.py for few tokens,
                    triton_tile.py for more, triton_arithmetic.py for both, launched by triton_launch.py; triton_ops.py
                    makes torch operators of them
"""
