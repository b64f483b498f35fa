"""Banks of another scale that compute the same: what is even trains evenly."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.installed import banks, projections


@torch.no_grad()
def rescale_banks(model: PreTrainedModel) -> None:
    """Spread every component's magnitude evenly over its A column and B row, and bring its weights near 1.

    The function stays the same up to rounding. Adam moves all numbers of a tensor at one scale, so components of
    unequal or lopsided scale would learn at unequal rates. Softmax compositions keep their logits.
    """
    users: dict[int, list[ComposedLinear]] = {}
    for _, composed in projections(model):
        users.setdefault(id(composed.bank), []).append(composed)
    for _, bank in banks(model):
        layers = users.get(id(bank), [])
        if layers and all(layer.composition != "softmax" for layer in layers):
            _absorb(bank, layers)
        a, b = bank.A.norm(dim=1), bank.B.norm(dim=2)  # (n, r)
        scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-30)).sqrt(), 1.0)
        bank.A.mul_(scale[:, None, :])
        bank.B.div_(scale[:, :, None])


def _absorb(bank: PrimitiveBank, layers: Sequence[ComposedLinear]) -> None:
    """Move the root mean square of each component's weights, over the layers that use it, into the bank."""
    width = layers[0].weight.shape[1]
    if any(layer.weight.shape[1] != width for layer in layers):
        return
    total, count = bank.A.new_zeros(bank.n_primitives, width), bank.A.new_zeros(bank.n_primitives, 1)
    for layer in layers:
        total.index_add_(0, layer.selected, layer.weight.square())
        count.index_add_(0, layer.selected, torch.ones_like(layer.weight[:, :1]))
    size = (total / count.clamp_min(1)).sqrt()
    size = torch.where(size > 0, size, 1.0)
    for layer in layers:
        layer.weight.div_(size[layer.selected])
    bank.A.mul_(size[:, None, :])
