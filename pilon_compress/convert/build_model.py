"""The PILON model of a conversion: the dense one with what was solved in the place of its projections."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.convert.plan import NeuronBankPlan, Plan
from pilon_compress.convert.solve.solved import Solved
from pilon_compress.models.source import Source
from pilon_compress.nn.fold import prune_unused
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import banks, neuron_banks
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.neuron_linear import NeuronLinear, fill_block


@torch.no_grad()
def build(
    source: Source, plan: Plan, solved: Solved, dtype: torch.dtype, quantization: str | None = None
) -> PreTrainedModel:
    """The PILON model: a copy of the dense one that shares every other tensor with it. Unused primitives are dropped.

    Of a streamed model the blocks are read once more, and everything in them is in `dtype` at once.
    """
    computed = source.model.dtype
    model = installed(source, plan.layout(quantization), dtype)
    modules, kind = dict(banks(model)), FORMATS[quantization or "none"]
    for bank in plan.banks:
        stored = solved.banks[bank.name]
        fit = stored.fit
        for side, tensor, rounded in (("A", fit.A, stored.A), ("B", fit.B, stored.B)):
            codes = None if rounded is None else rounded.stored
            # to the model's dtype first: rounded twice, as a model in memory is when it is saved
            kind.fill_bank(modules[bank.name], side, tensor.to(computed), codes)
        for place, site in enumerate(bank.sites):
            composed = model.base_model.get_submodule(site.name)
            composed.weight.copy_(fit.weight[place].to(computed))
            composed.selected.copy_(fit.selected[place])
    for store in plan.neuron_banks:
        fill_neurons(model, store, solved, computed)
    for name, projection in solved.projections.items():
        if projection.weights.neurons is not None:
            continue
        module, weights = model.base_model.get_submodule(name), projection.weights
        if weights.matrix is not None:
            codes = None if weights.rounded is None else weights.rounded.stored
            kind.fill_matrix(module, weights.matrix.to(computed), codes)
        if projection.bias is not None:
            module.bias.copy_(projection.bias.to(computed))
    completed(model, source, dtype)
    prune_unused(model)
    return model


def installed(source: Source, layout: Layout, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy of the dense model with a layout, uninitialised, that shares every other tensor with it.

    Of a streamed model new tensors are in `dtype`, and the rest of its blocks is on the meta device: see `completed`.
    """
    dense = source.model
    shared = {id(tensor): tensor for tensor in chain(dense.parameters(), dense.buffers())}
    model = copy.deepcopy(dense, memo=dict(shared))
    with default_dtype(dtype) if source.streamed else nullcontext():
        install(model, layout)
    return model


def completed(model: PreTrainedModel, source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Return an installed and filled model, in place, on the source's device, with all that a streamed one lacks."""
    if source.streamed:
        fill(model, source, dtype)
    model.to(source.device)
    return model.requires_grad_(False).eval()


def fill_neurons(model: PreTrainedModel, store: NeuronBankPlan, solved: Solved, dtype: torch.dtype) -> None:
    """Copy a bank of neurons, and the scales and biases of the blocks that use it, into the model."""
    fit = solved.stores[store.name]
    bank = dict(neuron_banks(model))[store.name]
    bank.fill({role: tensor.to(dtype) for role, tensor in {**fit.columns, "down": fit.rows}.items()})
    for layer, width in store.widths.items():
        block, scales, biases = dict[str, NeuronLinear](), dict[str, Tensor](), dict[str, Tensor]()
        for site in store.sites:
            if site.layer == layer:
                projection, module = solved.projections[site.name], model.base_model.get_submodule(site.name)
                assert isinstance(module, NeuronLinear) and projection.weights.neurons is not None
                block[site.role] = module
                if module.scaled:
                    scales[site.role] = projection.weights.neurons.scale.to(dtype)
                if module.bias is not None and projection.bias is not None:
                    biases[site.role] = projection.bias[: len(module.bias)].to(dtype)
        fill_block(block, fit.starts[layer].slots if width < store.neurons else None, scales, biases)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let torch make new floating-point tensors in `dtype` within the block."""
    own = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(own)


def fill(model: PreTrainedModel, source: Source, dtype: torch.dtype) -> None:
    """Read what conversion left alone in the blocks."""
    for index, name in enumerate(source.names):
        with source.block(index) as block:
            mine = model.base_model.get_submodule(name)
            dense = dict(block.named_parameters())
            for key, parameter in list(mine.named_parameters()):
                if parameter.is_meta:
                    set_module_tensor_to_device(mine, key, source.device, value=dense[key], dtype=dtype)
