"""Count who uses the primitives of a model's banks."""

from typing import Any

import torch
from torch import Tensor

from pilon_compress.nn.installed import projections
from pilon_compress.nn.neuron_linear import NeuronLinear


def shared_primitives(model: Any) -> int:
    """Return how many primitives of a PILON model two layers or more use: of factors, and whole neurons."""
    users = dict[int, Tensor]()
    for bank, used in _uses(model):
        users[bank] = users.get(bank, torch.zeros_like(used, dtype=torch.long)) + used
    return sum(int((count > 1).sum()) for count in users.values())


def _uses(model: Any) -> list[tuple[int, Tensor]]:
    """(bank, mask of its primitives) of every projection that composes, and of every block of neurons."""
    found = [(id(layer.bank), layer.used()) for _, layer in projections(model)]
    for _, layer in model.base_model.named_modules():
        if isinstance(layer, NeuronLinear) and layer.role == "down":  # one selection for the block
            used = torch.ones(layer.bank.neurons, dtype=torch.bool)
            chosen = layer.chosen()
            if chosen is not None:
                used = torch.zeros_like(used).index_fill(0, chosen.indices.cpu(), True)
            found.append((id(layer.bank), used))
    return found
