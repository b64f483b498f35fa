"""Install a layout: put projections and banks of ours, uninitialised, in the place of a model's dense projections."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from pilon_compress.nn.additions import add
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.exits import ExitGate, add_gate
from pilon_compress.nn.extended import extend
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.installed import label_parts
from pilon_compress.nn.layout import BANKS, Host, Layout
from pilon_compress.nn.neuron_bank import NeuronBank, Selection
from pilon_compress.nn.neuron_linear import NeuronLinear
from pilon_compress.nn.part import Projection, linear_shape
from pilon_compress.nn.rest import install_rest
from pilon_compress.nn.router import RoutedBlock, Router


def install(model: Host, layout: Layout) -> Host:
    """Put a projection of ours, uninitialised, in the place of every projection of `layout`.

    `model` may have a head or not: banks go to its base model, once each, so that every head class reads the same keys.
    Raises ValueError if the model has no such projection or its shape differs.
    """
    base = model.base_model
    banks: dict[str, nn.Module] = {
        name: FORMATS[spec.quantization].bank(spec.d_in, spec.d_out, spec.n_primitives, spec.rank)
        for name, spec in layout.banks.items()
    }
    for name, form in layout.neuron_banks.items():
        banks[name] = NeuronBank(form.neurons, form.d_in, form.d_out, form.gated, form.quantization, form.group)
    selections = {
        name: Selection(layout.neuron_banks[spec.bank].neurons, spec.top_k, layout.selections(name))
        for name, spec in layout.neurons.items()
        if spec.selection == name
    }
    routers = {block: Router(**vars(spec)) for block, spec in layout.routers.items()}
    for name in layout.replaced:
        try:
            dense = base.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the layout names {name}, which {type(base).__name__} does not have") from None
        expected = layout.host_shape(name)
        if linear_shape(dense) != expected:
            raise ValueError(f"{name} is {linear_shape(dense)} in the model, {expected} in the layout")
        base.set_submodule(name, _module(layout, name, banks, selections, routers.get(layout.router_of(name))))
    for block, router in routers.items():
        route(base.get_submodule(block), router, block)
    setattr(base, BANKS, _tree(banks))
    for name, kind, place in layout.additions():
        add(banks[place] if place in banks else base.get_submodule(place), name, kind)
    for name, gate in layout.exits.items():
        add_gate(base.get_submodule(name), ExitGate(gate.d, gate.threshold, gate.substitute))
    install_rest(model, layout.rest)
    label_parts(model)
    no_split = getattr(base, "_no_split_modules", None)
    if no_split is not None:  # device_map="auto" must keep a bank on one device
        base._no_split_modules = [*no_split, *sorted({type(bank).__name__ for bank in banks.values()})]
    return model


def _tree(banks: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Return the banks as a tree of modules: `band0.up` is `up` in `band0`."""
    tree = nn.ModuleDict()
    for name, bank in banks.items():
        *folders, leaf = name.split(".")
        node: nn.ModuleDict = tree
        for folder in folders:
            if folder not in node:
                node[folder] = nn.ModuleDict()
            child = node[folder]
            assert isinstance(child, nn.ModuleDict)
            node = child
        node[leaf] = bank
    return tree


def route(block: nn.Module, router: Router, name: str) -> None:
    """Let the `router` choose which recipe of its projections computes a token of `block`, in place.

    Raises ValueError for a block that has more than projections of ours: they would see sorted rows, too; and for one
    with an exit gate, which must lie around the router.
    """
    if hasattr(block, "exit_gate"):
        raise ValueError(f"{name} has an exit gate: experts come before it")
    own = [f"{path}." for path, module in block.named_modules() if isinstance(module, Projection)]
    other = next((path for path, _ in block.named_parameters() if not path.startswith(tuple(own))), None)
    if other is not None or hasattr(block, "router"):
        raise ValueError(f"{name} cannot have experts: it has {other or 'a router'} beside its projections")
    extend(block, RoutedBlock)
    block.router = router


def _module(
    layout: Layout,
    name: str,
    banks: Mapping[str, Any],
    selections: Mapping[str, Selection],
    router: Router | None,
) -> nn.Module:
    host_shape = layout.host_shape(name)
    if name in layout.neurons:
        one = layout.neurons[name]
        return NeuronLinear(
            banks[one.bank],
            one.role,
            selections.get(one.selection),
            owns=one.selection == name,
            scaled=one.scaled,
            bias=one.bias,
            host_shape=host_shape,
            router=router,
        )
    if name in layout.matrices:
        matrix = layout.matrices[name]
        return FORMATS[matrix.quantization].matrix(matrix.d_in, matrix.d_out, matrix.bias, host_shape, matrix.group)
    spec = layout.projections[name]
    return ComposedLinear(banks[spec.bank], spec.top_k, spec.bias, spec.composition, host_shape, spec.group, router)
