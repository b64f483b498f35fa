"""Torch operators over the Triton kernels: one projection, one dense matrix, one feed-forward block.

An operator takes a projection as a list: A, B, selected, scale, shift or None, bias or None (see gpu.GpuProjection).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilon_compress.kernels.triton_launch import (
    FEW,
    GROUP,
    Operands,
    down_parts,
    hidden_codes,
    latent_tiled,
    latent_vectors,
    launches,
    outputs,
    projected,
    quantised_hidden,
    quantised_rows,
)


def _operands(tensors: Sequence[Tensor | None]) -> Operands:
    return Operands(*tensors)  # type: ignore[arg-type]


@torch.library.triton_op("pilon_gpu::project", mutates_args=())
def project(x: Tensor, projection: Sequence[Tensor | None], group: int) -> Tensor:
    """Compute a projection through a bank: `x` (..., d_in) -> (..., d_out), in the dtype of x."""
    parts, rows = _operands(projection), x.reshape(-1, x.shape[-1]).contiguous()
    tokens = rows.shape[0]
    if tokens == 0:
        y = x.new_empty(0, parts.B.shape[2])
    elif tokens <= FEW:
        y = outputs(latent_vectors(rows, None, parts, None, group).view(tokens, 1, -1), parts, x.dtype)
    else:
        y = projected(quantised_rows(rows, parts.A, group), parts, group, x.dtype)
    return y.reshape(*x.shape[:-1], parts.B.shape[2])


@project.register_fake
def _(x: Tensor, projection: Sequence[Tensor | None], group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], _operands(projection).B.shape[2])


@torch.library.triton_op("pilon_gpu::linear", mutates_args=())
def linear(x: Tensor, words: Tensor, selected: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """Compute a projection by a dense matrix: `x` (..., d_in) -> (..., d_out), in the dtype of x.

    The matrix is a bank of one primitive, whose latent vector is the output; it is scaled and not quantised.
    """
    rows, one = x.reshape(-1, x.shape[-1]).contiguous(), Operands(words, words, selected, scale, None, None)
    tokens, d_out = rows.shape[0], scale.shape[0]
    if tokens == 0:
        y = x.new_empty(0, d_out, dtype=torch.float32)
    elif tokens <= FEW:
        y = latent_vectors(rows, None, one, None, group).view(tokens, d_out)
    else:
        y = latent_tiled(quantised_rows(rows, words, group), one, group)
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
    """Compute a feed-forward block of `x` (..., d): (..., d), in the dtype of x; `gate` may be empty, `act` an index.

    The index is that of the activation in triton_arithmetic.ACTIVATIONS.
    """
    first, last, gate_operands = _operands(up), _operands(down), _operands(gate) if gate else None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = rows.shape[0]
    number = launches(tokens, gate_operands, first)
    if tokens == 0:
        y = x.new_empty(0, last.B.shape[2])
    elif number == 2:
        y = outputs(down_parts(rows, gate_operands, first, last, act), last, x.dtype)
    elif number:
        coded = hidden_codes(rows, gate_operands, first, last.A.shape[1], act)
        u = latent_vectors(rows.new_empty(0, first.B.shape[2]), coded, last, None, GROUP)
        y = outputs(u.view(tokens, 1, -1), last, x.dtype)
    else:
        coded = quantised_rows(rows, first.A, 0)
        y_up = projected(coded, first, 0, torch.float32)
        y_gate = None if gate_operands is None else projected(coded, gate_operands, 0, torch.float32)
        y = projected(quantised_hidden(y_gate, y_up, last.A.shape[1], act), last, GROUP, x.dtype)
    return y.reshape(*x.shape[:-1], last.B.shape[2])


@ffn.register_fake
def _(
    x: Tensor,
    gate: Sequence[Tensor | None],
    up: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    act: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _operands(down).B.shape[2])
