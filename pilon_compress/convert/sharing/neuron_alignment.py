"""Neurons of different layers, brought into an order in which those that do alike stand at the same place.

A feed-forward block computes the same whatever the order of its neurons, so layers that share a bank may each choose
theirs. Neurons are matched by linear assignment on their normalised columns of up (and gate) and rows of down, as in
Git Re-Basin (Ainsworth et al., 2023), which matches whole networks.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize


def align(neurons: Sequence[Tensor]) -> list[Tensor]:
    """For each layer the order (m,) of its neurons that matches the mean of the layers before it.

    `neurons`: per layer (m, features), a row for each neuron, the same features for every layer.
    """
    rows = [normalize(layer.double(), dim=1) for layer in neurons]
    orders = [torch.arange(len(rows[0]), device=rows[0].device)]
    mean = rows[0].clone()
    for count, layer in enumerate(rows[1:], 1):
        _, matched = linear_sum_assignment(-(mean @ layer.T).cpu().numpy())
        order = torch.from_numpy(matched).to(layer.device)
        orders.append(order)
        mean = (mean * count + layer[order]) / (count + 1)
    return orders
