"""Kernels: exact products of ternary and int8 weights with quantised activations. They import nothing of models.

Reading order:

    reference.py    the arithmetic in plain torch, which every kernel reproduces bit for bit
    dispatch.py     the entry for packed models: picks a backend by device and shape
    cpu_layout.py   ternary weights packed for CPUs: two bits each, in blocks of 16 outputs by 8 inputs
    cpu.py          project, ffn (each also prepared for many calls) and int8_linear, by the compiled kernel or torch
    build.py        compiles the kernel library on first use, or beforehand for a wheel
    ternary.cpp     the kernel: loops.h is its inner part, isa_*.h the instruction sets, operators.h the torch operators
    gpu_layout.py   ternary weights packed for GPUs: 16 in an int32 word
    gpu.py          projections and blocks by Triton: triton_gemv.py and triton_front.py for few tokens,
                    triton_tile.py for more, triton_arithmetic.py for both, launched by triton_launch.py; triton_ops.py
                    makes torch operators of them
"""
