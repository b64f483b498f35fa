"""Give the blocks of an installed model experts: each begins as a copy of the block's one recipe."""

from collections.abc import Mapping
from typing import Any

import torch

from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.install import route
from pilon_compress.nn.installed import label_parts
from pilon_compress.nn.layout import Host
from pilon_compress.nn.neuron_bank import Selection
from pilon_compress.nn.neuron_linear import NeuronLinear
from pilon_compress.nn.router import Router
from pilon_compress.nn.specs import RouterSpec


@torch.no_grad()
def add_experts(model: Host, routers: Mapping[str, RouterSpec]) -> None:
    """Put a router, whose weights are zero, into every block of that name, in place; outputs stay as they are.

    The block's projections must be compositions or use neurons; without shared experts its weights sum to 1.
    """
    base = model.base_model
    for name, spec in routers.items():
        block, router = base.get_submodule(name), Router(**vars(spec))
        for parameter in router.parameters():
            parameter.zero_()
        layers: list[tuple[str, Any]] = [
            (path, layer) for path, layer in block.named_modules() if isinstance(layer, ComposedLinear | NeuronLinear)
        ]
        old = next((one.selection for _, one in layers if isinstance(one, NeuronLinear)), None)
        selection = None if old is None else Selection(old.neurons, old.top_k, *router.selections)
        if selection is not None and old is not None:
            selection.selected.copy_(old.selected)
        for path, layer in layers:
            made = _with_recipes(layer, router, selection)
            for key, tensor in layer.state_dict().items():
                made.state_dict()[key].copy_(tensor)  # a row for each expert
            block.set_submodule(path, made.to(layer.weight.device, layer.weight.dtype).train(layer.training))
        route(block, router.to(next(block.parameters()).device).train(block.training), name)
    label_parts(model)


def _with_recipes(layer: Any, router: Router, selection: Selection | None) -> Any:
    """Return a projection as `layer`, uninitialised, with a recipe for each expert of `router`."""
    shape = layer.host_shape
    if isinstance(layer, ComposedLinear):
        bias = layer.bias is not None
        return ComposedLinear(layer.bank, layer.top_k, bias, layer.composition, shape, layer.group, router)
    return NeuronLinear(
        layer.bank,
        layer.role,
        selection,
        owns=layer.owns,
        scaled=layer.scaled,
        bias=layer.bias_of_dense,
        host_shape=shape,
        router=router,
    )
