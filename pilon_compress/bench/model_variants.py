"""Build a complete model in every variant of the benchmark.

Dense and ternary variants have random weights of the model's shapes, since time does not depend on values.

To add one, write a function from the loaded PILON model to a model and put it into `VARIANTS`.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pilon_compress.bench.block_variants import (
    Unavailable,
    needs_kernel,
    ternary_bank,
    ternary_matrix,
    weight_only_int8,
)
from pilon_compress.kernels import cpu, reference
from pilon_compress.models import checkpoint
from pilon_compress.models.families import find_sites
from pilon_compress.nn.additions import carry
from pilon_compress.nn.fold import fold
from pilon_compress.nn.installed import dense_matrices, projections
from pilon_compress.nn.int8 import Int8Product
from pilon_compress.nn.layout import BANKS


class TernaryProjection(nn.Module):
    """A module around a prepared ternary projection."""

    def __init__(self, projection: cpu.CpuProjection) -> None:
        super().__init__()
        self.project = cpu.prepared(projection)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., d_in) -> (..., d_out)."""
        return self.project(x)


class Int8Projection(nn.Module):
    """A linear of int8 weights, by torch's product; with `int8_inputs` by this package's, on int8 activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None, int8_inputs: bool) -> None:
        super().__init__()
        self.bias, self.int8_inputs = bias, int8_inputs
        if int8_inputs:
            self.rows, self.scale = reference.int8_rows(weight)
            self.own_product = Int8Product()
        else:
            self.product = weight_only_int8(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (..., d_in) -> (..., d_out)."""
        if self.int8_inputs:
            return self.own_product(x, self.rows, self.scale, self.bias)
        y = self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def dense_fp32(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the dense architecture in float32, the baseline."""
    return checkpoint.build(pilon.config).to(pilon.device, torch.float32).eval()


def dense_bf16(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the dense architecture in bfloat16."""
    return dense_fp32(pilon).to(torch.bfloat16)


def dense_int8(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the dense architecture with int8 weights in all linears and bfloat16 activations."""
    return _in_int8(dense_fp32(pilon), int8_inputs=False).to(torch.bfloat16)


def dense_ternary(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the dense architecture with ternary feed-forward matrices, the rest in float32. Raises Unavailable."""
    needs_kernel(pilon.device)
    model = dense_fp32(pilon)
    for site in find_sites(model):
        model.base_model.set_submodule(site.name, TernaryProjection(ternary_matrix(site.d_in, site.d_out)))
    return model


def pilon_loaded(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the loaded model."""
    return copy.deepcopy(pilon)


def pilon_fp32(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the model with every composition folded into two dense matrices, in float32. Raises Unavailable."""
    try:
        return fold(copy.deepcopy(pilon))
    except ValueError as reason:
        raise Unavailable(str(reason)) from None


def pilon_bf16(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the folded model in bfloat16. Raises Unavailable."""
    return pilon_fp32(pilon).to(torch.bfloat16)


def pilon_int8(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the folded model with int8 weights in all linears and bfloat16 activations. Raises Unavailable."""
    return _in_int8(pilon_fp32(pilon), int8_inputs=False).to(torch.bfloat16)


def pilon_ternary(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the model with ternary feed-forward banks and matrices, the rest in float32. Raises Unavailable."""
    needs_kernel(pilon.device)
    model = copy.deepcopy(pilon)
    for name, composed in list(projections(model)):
        bank, k = composed.bank, composed.top_k
        projection = ternary_bank(bank.d_in, bank.d_out, k * bank.rank, bank.rank, bank.n_primitives)
        model.base_model.set_submodule(name, carry(composed, TernaryProjection(_biased(projection, composed.bias))))
    for name, dense in list(dense_matrices(model)):
        projection = ternary_matrix(dense.in_features, dense.out_features)
        model.base_model.set_submodule(name, carry(dense, TernaryProjection(_biased(projection, dense.bias))))
    delattr(model.base_model, BANKS)
    return model


def pilon_ternary_int8(pilon: PreTrainedModel) -> PreTrainedModel:
    """Return the model with ternary feed-forward banks; attention and head in int8 with int8 activations."""
    return _in_int8(pilon_ternary(pilon), int8_inputs=True)


VARIANTS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    function.__name__: function
    for function in (
        *(dense_fp32, dense_bf16, dense_int8, dense_ternary),
        *(pilon_loaded, pilon_fp32, pilon_bf16, pilon_int8, pilon_ternary, pilon_ternary_int8),
    )
}


def _in_int8(model: PreTrainedModel, int8_inputs: bool) -> PreTrainedModel:
    """Replace every linear of the model, including the head, by an int8 one."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear | Conv1D):
            weight = layer.weight.detach()
            weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
            model.set_submodule(name, carry(layer, Int8Projection(weight, layer.bias, int8_inputs)))
    return model


def _biased(projection: cpu.CpuProjection, bias: Tensor | None) -> cpu.CpuProjection:
    projection.bias = None if bias is None else bias.detach().float()
    return projection
