"""Count who uses the primitives of a model's banks."""

from typing import Any

import torch

from pilon_compress.nn.layout import projections


def shared_primitives(model: Any) -> int:
    """Return how many primitives of a PILON model two projections or more select."""
    users = dict[int, torch.Tensor]()
    for _, layer in projections(model):
        used = layer.used().long()
        users[id(layer.bank)] = users.get(id(layer.bank), torch.zeros_like(used)) + used
    return sum(int((count > 1).sum()) for count in users.values())
