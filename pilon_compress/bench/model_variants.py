"""The forms in which the benchmark runs a whole model.

Dense ones have random weights and ternary ones random digits, of the model's own shapes: they take the same time.

To add one, write a function from the loaded PILON model to a model and put it into `FORMS`.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pilon_compress.bench.block_variants import NotHere, needs_kernel, ternary_bank, ternary_matrix, weight_only_int8
from pilon_compress.kernels import cpu
from pilon_compress.models import checkpoint
from pilon_compress.models.families import find_sites
from pilon_compress.nn.additions import carry
from pilon_compress.nn.fold import fold
from pilon_compress.nn.layout import BANKS, kept_matrices, projections


class TernaryProjection(nn.Module):
    """A projection of random digits."""

    def __init__(self, projection: cpu.CpuProjection) -> None:
        super().__init__()
        self.project = cpu.prepared(projection)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)


class Int8Projection(nn.Module):
    """A dense layer in int8: torch's own product, or with `whole` this package's, which takes 8-bit activations too."""

    def __init__(self, weight: Tensor, bias: Tensor | None, whole: bool) -> None:
        super().__init__()
        self.bias, self.whole = bias, whole
        if whole:
            self.rows, self.scale = cpu.int8_rows(weight)
        else:
            self.product = weight_only_int8(weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return cpu.int8_linear(x, self.rows, self.scale, self.bias)
        y = self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def dense_fp32(pilon: PreTrainedModel) -> PreTrainedModel:
    return checkpoint.build(pilon.config).to(pilon.device, torch.float32).eval()


def dense_bf16(pilon: PreTrainedModel) -> PreTrainedModel:
    return dense_fp32(pilon).to(torch.bfloat16)


def dense_int8(pilon: PreTrainedModel) -> PreTrainedModel:
    """Weights of all layers in int8, activations in bfloat16."""
    return _in_int8(dense_fp32(pilon), whole=False).to(torch.bfloat16)


def dense_ternary(pilon: PreTrainedModel) -> PreTrainedModel:
    """Feed-forward matrices ternary, the rest in float32."""
    needs_kernel(pilon.device)
    model = dense_fp32(pilon)
    for site in find_sites(model):
        model.base_model.set_submodule(site.name, TernaryProjection(ternary_matrix(site.d_in, site.d_out)))
    return model


def pilon_loaded(pilon: PreTrainedModel) -> PreTrainedModel:
    """As `from_pretrained` gives it."""
    return copy.deepcopy(pilon)


def pilon_fp32(pilon: PreTrainedModel) -> PreTrainedModel:
    """Compositions folded into two plain matrices each."""
    try:
        return fold(copy.deepcopy(pilon))
    except ValueError as reason:
        raise NotHere(str(reason)) from None


def pilon_bf16(pilon: PreTrainedModel) -> PreTrainedModel:
    return pilon_fp32(pilon).to(torch.bfloat16)


def pilon_int8(pilon: PreTrainedModel) -> PreTrainedModel:
    """Folded; weights of all layers in int8, activations in bfloat16."""
    return _in_int8(pilon_fp32(pilon), whole=False).to(torch.bfloat16)


def pilon_ternary(pilon: PreTrainedModel) -> PreTrainedModel:
    """Feed-forward banks ternary, the rest in float32."""
    needs_kernel(pilon.device)
    model = copy.deepcopy(pilon)
    for name, composed in list(projections(model)):
        bank, k = composed.bank, composed.top_k
        if bank.rank % 16:
            raise NotHere(f"there is a bank of rank {bank.rank}: the ternary kernel takes multiples of 16")
        made = ternary_bank(bank.d_in, bank.d_out, k * bank.rank, bank.rank, bank.n_primitives)
        model.base_model.set_submodule(name, carry(composed, TernaryProjection(_biased(made, composed.bias))))
    for name, kept in list(kept_matrices(model)):
        made = ternary_matrix(kept.in_features, kept.out_features)
        model.base_model.set_submodule(name, carry(kept, TernaryProjection(_biased(made, kept.bias))))
    delattr(model.base_model, BANKS)
    return model


def pilon_ternary_int8(pilon: PreTrainedModel) -> PreTrainedModel:
    """Feed-forward banks ternary; attention and head in int8, activations too."""
    return _in_int8(pilon_ternary(pilon), whole=True)


FORMS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    function.__name__: function
    for function in (
        *(dense_fp32, dense_bf16, dense_int8, dense_ternary),
        *(pilon_loaded, pilon_fp32, pilon_bf16, pilon_int8, pilon_ternary, pilon_ternary_int8),
    )
}


def _in_int8(model: PreTrainedModel, whole: bool) -> PreTrainedModel:
    """Every plain linear layer, the head too."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear | Conv1D):
            weight = layer.weight.detach()
            weight = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
            model.set_submodule(name, carry(layer, Int8Projection(weight, layer.bias, whole)))
    return model


def _biased(made: cpu.CpuProjection, bias: Tensor | None) -> cpu.CpuProjection:
    made.bias = None if bias is None else bias.detach().float()
    return made
