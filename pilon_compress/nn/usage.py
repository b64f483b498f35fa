"""Count who uses the primitives of a model's banks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pilon_compress.nn.installed import neuron_blocks, projections
from pilon_compress.nn.neuron_linear import NeuronLinear
from pilon_compress.nn.sharded import full


def shared_primitives(model: Any) -> int:
    """Return how many primitives of a PILON model two layers or more use: of factors, and whole neurons."""
    users = dict[int, Tensor]()
    for bank, used in _uses(model):
        users[bank] = users.get(bank, torch.zeros_like(used, dtype=torch.long)) + used
    return sum(int((count > 1).sum()) for count in users.values())


def _uses(model: Any) -> list[tuple[int, Tensor]]:
    """(bank, mask of its primitives) of every projection that composes, and of every block of neurons."""
    found = [(id(layer.bank), layer.used()) for _, layer in projections(model)]
    return found + [(id(block["down"].bank), used_neurons(block)) for block in neuron_blocks(model)]


def used_neurons(block: Mapping[str, NeuronLinear]) -> Tensor:
    """Return a mask (N,), bool, of the neurons of its bank that a block uses; `block` by role."""
    bank, selection = block["down"].bank, block["down"].selection
    if selection is None:
        return torch.ones(bank.neurons, dtype=torch.bool)
    return torch.zeros(bank.neurons, dtype=torch.bool).index_fill(0, selection.selected.cpu().flatten(), True)


def neuron_energy(block: Mapping[str, NeuronLinear]) -> Tensor:
    """Return the energy (N,) of each neuron of its bank in a block: (s · ‖in‖ · s' · ‖out‖)², 0 of those not used.

    Of a block with experts it is the mean over them.
    """
    bank, selection, experts = block["down"].bank, block["down"].selection, block["down"].experts
    scale = torch.ones(block["down"].top_k)
    for layer in block.values():
        if layer.scaled:
            scale = scale * full(layer.weight).detach().cpu().float()
    places = torch.arange(bank.neurons) if selection is None else selection.selected.cpu()
    size = bank.sizes().cpu().float()
    energy = (scale * size[places]).square().expand(experts, -1) / experts
    return torch.zeros_like(size).index_add(0, places.expand_as(energy).flatten(), energy.flatten())
