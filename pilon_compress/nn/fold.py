"""Folding: what a composition amounts to once it no longer changes. Two plain GEMMs, or one where that is cheaper."""

import torch
from torch import Tensor, nn

from pilon_compress.nn.additions import carry
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.installed import (
    banks,
    dense_matrices,
    neuron_banks,
    neuron_projections,
    projections,
    routers,
)
from pilon_compress.nn.layout import BANKS, Host


def pair_is_cheaper(rank: int, d_in: int, d_out: int) -> bool:
    """Return True if two GEMMs through `rank` (= k·r) need fewer MACs per token than one dense GEMM."""
    return rank * (d_in + d_out) < d_in * d_out


@torch.no_grad()
def factors(composed: ComposedLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """A (d_in, k·r), B (k·r, d_out), bias (d_out,) or None, so that the projection is `x @ A @ B + bias`.

    The composition weight, and what the bank makes of it, are folded in. Computed in float64, returned in the weight's
    dtype.
    """
    bank, selected, (factor, shift) = composed.bank, composed.coefficients()[0], composed.affine()
    A, B = (factor.double() for factor in bank.primitives(selected))
    A = A.permute(1, 0, 2).reshape(bank.d_in, -1)
    scaled, dtype = B * factor.double()[:, :, None], factor.dtype
    bias = None if composed.bias is None else composed.bias.double()
    if shift is not None:
        moved = torch.einsum("kr,kro->o", shift.double().expand(B.shape[:2]), B)
        bias = moved if bias is None else bias + moved
    return A.to(dtype), scaled.reshape(-1, bank.d_out).to(dtype), None if bias is None else bias.to(dtype)


@torch.no_grad()
def dense(composed: ComposedLinear) -> tuple[Tensor, Tensor | None]:
    """The one matrix W (d_in, d_out) that the composition amounts to, and its bias. Multiplied out in float64."""
    A, B, bias = factors(composed)
    return (A.double() @ B.double()).to(A.dtype), bias


def foldable(model: Host) -> bool:
    """Return True if `fold` may change the model, which it may not with ternary banks, nor with experts."""
    return (
        not any(True for _ in routers(model))
        and all(bank.folds for _, bank in banks(model))
        and all(store.folds for _, store in neuron_banks(model))
    )


@torch.no_grad()
def fold(model: Host) -> Host:
    """Replace, in place, every composed projection by plain nn.Linear layers and drop the banks: for inference only.

    A projection becomes two Linears, or one where k·r > d_in·d_out / (d_in + d_out), or where it uses a bank of
    neurons: then that of its k neurons. The result runs faster, holds more
    memory than the shared banks, and is no longer a PILON model that could be saved as one. Raises ValueError for
    ternary banks: their products are of integers, which folding would lose; and for experts, which are no one matrix.
    """
    if any(True for _ in routers(model)):
        raise ValueError("experts do not fold: a token's matrices depend on the token")
    if not foldable(model):
        raise ValueError("ternary banks do not fold: export them packed")
    base = model.base_model
    for name, matrix in list(dense_matrices(model)):
        if matrix.unfolds:
            plain: nn.Module = _linear(matrix.matrix().to(base.dtype), matrix.bias)
            base.set_submodule(name, carry(matrix, plain))
    for name, composed in list(projections(model)):
        bank = composed.bank
        if pair_is_cheaper(composed.top_k * bank.rank, bank.d_in, bank.d_out):
            A, B, bias = factors(composed)
            plain = nn.Sequential(_linear(A, None), _linear(B, bias))
        else:
            plain = _linear(*dense(composed))
        base.set_submodule(name, carry(composed, plain))
    for name, layer in list(neuron_projections(model)):
        weight, bias = layer.matrix()
        base.set_submodule(name, carry(layer, _linear(weight.to(base.dtype), bias)))
    delattr(base, BANKS)
    return model


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    d_in, d_out = weight.shape
    linear = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.T.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear


@torch.no_grad()
def prune_unused(model: Host) -> int:
    """Drop, in place, the primitives that no layer selects; outputs stay bit-identical. Returns how many went.

    Banks of whole neurons stay as they are: training and conversion make none that no block uses.
    """
    gone = 0
    users: dict[int, list[ComposedLinear]] = {}
    for _, composed in projections(model):
        users.setdefault(id(composed.bank), []).append(composed)
    for _, bank in banks(model):
        layers = users.get(id(bank), [])
        used = torch.zeros(bank.n_primitives, dtype=torch.bool, device=layers[0].weight.device if layers else None)
        for layer in layers:
            used[layer.coefficients()[0].flatten()] = True
        if bool(used.all()):
            continue
        for layer in layers:
            layer.keep(used)
        gone += int((~used).sum())
        bank.keep(used)
    return gone
