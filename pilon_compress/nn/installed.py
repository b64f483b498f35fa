"""Find what a layout put into a model: banks, projections and matrices by name, and the layout itself."""

from collections.abc import Iterator
from typing import Any

import torch

from pilon_compress.nn.additions import added, addition
from pilon_compress.nn.bank import PrimitiveBank, banks_in
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.exits import gated_blocks
from pilon_compress.nn.layout import BANKS, Host, Layout
from pilon_compress.nn.neuron_bank import NeuronBank
from pilon_compress.nn.neuron_linear import NeuronLinear
from pilon_compress.nn.part import Matrix, Part, linear_shape
from pilon_compress.nn.rest import installed
from pilon_compress.nn.router import Router
from pilon_compress.nn.specs import BankSpec, DenseSpec, NeuronBankSpec, NeuronSpec, ProjectionSpec, RouterSpec


def projections(model: Host) -> Iterator[tuple[str, ComposedLinear]]:
    """Yield every composed projection of a PILON model, by module name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, ComposedLinear):
            yield name, module


def dense_matrices(model: Host) -> Iterator[tuple[str, Any]]:
    """Yield every dense projection of a PILON model, a `Matrix`, by module name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, Matrix) and not name.startswith(f"{BANKS}."):
            yield name, module


def neuron_projections(model: Host) -> Iterator[tuple[str, NeuronLinear]]:
    """Yield every projection of a PILON model that uses a bank of neurons, by module name below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, NeuronLinear):
            yield name, module


def neuron_banks(model: Host) -> Iterator[tuple[str, NeuronBank]]:
    """Yield every bank of neurons of a PILON model by its layout name (`band0`)."""
    for name, bank in model.base_model.named_modules():
        if isinstance(bank, NeuronBank):
            yield name.removeprefix(f"{BANKS}."), bank


def neuron_blocks(model: Host) -> Iterator[dict[str, NeuronLinear]]:
    """Yield, by role, the projections of every block whose neurons come from a bank, in layer order."""
    block: dict[str, NeuronLinear] = {}
    for _, layer in neuron_projections(model):
        if layer.role in block:
            yield block
            block = {}
        block[layer.role] = layer
    if block:
        yield block


def routers(model: Host) -> Iterator[tuple[str, Router]]:
    """Yield every router of a PILON model, by module name of its feed-forward block below the base model."""
    for name, module in model.base_model.named_modules():
        if isinstance(module, Router):
            yield name.rpartition(".")[0], module


def banks(model: Host) -> Iterator[tuple[str, PrimitiveBank]]:
    """Yield every bank of a PILON model by its layout name (`band0.up`)."""
    for name, bank in banks_in(model.base_model):
        yield name.removeprefix(f"{BANKS}."), bank


def parts(model: Host) -> Iterator[tuple[str, Any]]:
    """Yield every `Part` by module name: banks, projections, int8 layers."""
    for name, module in model.named_modules():
        if isinstance(module, Part):
            yield name, module


def label_parts(model: Host) -> None:
    """Tell every `Part` its name in the model, which its messages begin with."""
    for name, part in parts(model):
        part.label = name


def stored_types(model: Host) -> dict[str, torch.dtype]:
    """By name, the type of tensors that are stored in their own, whatever that of the model."""
    found = dict[str, torch.dtype]()
    for name, module in parts(model):
        found |= {f"{name}.{tensor}": dtype for tensor, dtype in module.own_types().items()}
        for research, kind in added(module):
            found |= {f"{name}.{tensor}": torch.float32 for tensor in addition(research, kind).exact}
    return found


def layout_of(model: Host) -> Layout:
    """Read the layout back from an installed model."""
    names = {id(bank): name for name, bank in banks(model)}
    specs = {name: BankSpec(b.d_in, b.d_out, b.n_primitives, b.rank, b.format) for name, b in banks(model)}
    composed = {
        name: ProjectionSpec(names[id(p.bank)], p.top_k, p.bias is not None, p.composition, p.group, p.experts)
        for name, p in projections(model)
    }
    matrices = {
        name: DenseSpec(m.in_features, m.out_features, m.bias is not None, m.format, m.group)
        for name, m in dense_matrices(model)
    }
    homes = {id(bank): name for name, bank in neuron_banks(model)}
    owners = {id(one.selection): name for name, one in neuron_projections(model) if one.owns}
    neurons = {
        name: NeuronSpec(
            homes[id(one.bank)],
            one.role,
            one.top_k,
            one.bias_of_dense,
            owners.get(id(one.selection), ""),
            one.scaled,
            one.experts,
        )
        for name, one in neuron_projections(model)
    }
    stores = {
        name: NeuronBankSpec(b.neurons, b.d_in, b.d_out, b.gated, b.format, b.group) for name, b in neuron_banks(model)
    }
    layers = [*projections(model), *dense_matrices(model), *neuron_projections(model)]
    host = {name: layer.host_shape for name, layer in layers if layer.host_shape != linear_shape(layer)}
    exits = {name: block.exit_gate.spec for name, block in gated_blocks(model)}
    routed = {
        name: RouterSpec(one.width, one.experts, one.top_k, one.kind, one.shared, one.mix, one.gates)
        for name, one in routers(model)
    }
    layout = Layout(specs, composed, matrices, host, installed(model), {}, stores, neurons, exits, routed)
    for name, research, kind in ((name, *one) for name, module in (*banks(model), *layers) for one in added(module)):
        layout = layout.with_addition(research, kind, [name])
    return layout
