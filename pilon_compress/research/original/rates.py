"""The original PILON's schedules: phases with rates of their own, bands that begin to learn in turn, regularisers.

    factor on a group's learning rate = the phase's factor on banks, compositions or the rest
                                        x 0 for banks and compositions of bands whose turn has not come
    added to the loss                 = diversity · mean cosine of a band's compositions - entropy · their mean entropy

How many primitives and components take part is in `selection`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.errors import BadInput
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.installed import banks, projections
from pilon_compress.nn.sharded import full
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.research.original.moving_linear import StagedLinear
from pilon_compress.research.original.settings import Staged


class RateSchedule(Callback):
    """Rates before each step, and the regularisers."""

    def __init__(self, model: Any, asked: Staged, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.asked, self.optimizers = asked, optimizers
        bands: dict[str, list[list[ComposedLinear]]] = {}
        for name, bank in banks(model):
            layers = [layer for _, layer in projections(model) if layer.bank is bank]
            bands.setdefault(name.split(".")[0], []).append(layers)
        self.banks = [layers for members in bands.values() for layers in members if layers]
        if asked.unfreeze:
            if bands and len(asked.unfreeze) != len(bands):
                raise BadInput(
                    f"research.original.staged.unfreeze has {len(asked.unfreeze)} entries for {len(bands)} bands"
                )
            _split(optimizers, list(bands.values()))

    def before(self, step: int, share: float) -> None:
        """Scale the learning rates of a step by group and band."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= self.factor(group["name"], group.get("band"), share)

    def factor(self, group: str, band: int | None, share: float) -> float:
        """Factor on the learning rate of a group of parameters (see optim.GROUPS) of a band, where it has one."""
        asked = self.asked
        if band is not None and asked.unfreeze and share < asked.unfreeze[band]:
            return 0.0
        rates = getattr(asked, group) if group in ("banks", "compositions") else asked.base
        phase = sum(share >= end for end in asked.phases[:-1])
        return float(rates[phase]) if rates else 1.0

    def penalty(self) -> Tensor | None:
        """Return the regularisers of a step, a scalar to add to the loss; None if none is asked for."""
        asked, terms = self.asked, []
        if asked.entropy and self.banks:
            values = [entropy(use_of(layer)) for layers in self.banks for layer in layers]
            terms.append(-asked.entropy * torch.stack(values).mean())
        shared = [layers for layers in self.banks if len(layers) > 1]
        if asked.diversity and shared:
            terms.append(asked.diversity * torch.stack([similarity(layers) for layers in shared]).mean())
        return sum(terms) if terms else None  # type: ignore[return-value]


def _split(optimizers: Sequence[torch.optim.Optimizer], bands: list[list[list[ComposedLinear]]]) -> None:
    """Divide the groups of banks and compositions by band; the new groups know theirs."""
    owner: dict[int, int] = {}
    for index, members in enumerate(bands):
        for layers in members:
            for module in [layer.bank for layer in layers[:1]] + layers:
                owner |= {id(parameter): index for parameter in module.parameters(recurse=False)}
    for optimizer in optimizers:
        for group in list(optimizer.param_groups):
            if group["name"] not in ("banks", "compositions"):
                continue
            by_band: dict[int | None, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_band.setdefault(owner.get(id(parameter)), []).append(parameter)
            optimizer.param_groups.remove(group)
            optimizer.param_groups.extend({**group, "params": own, "band": band} for band, own in by_band.items())


def use_of(layer: ComposedLinear) -> Tensor:
    """Return a layer's use of each primitive, (n,), with gradient: softmax of all logits, else |g_p|²."""
    weight = full(layer.weight)
    if layer.composition == "softmax":
        return weight[:, 0].softmax(0)
    size = weight.square().sum(1)
    if isinstance(layer, StagedLinear) and layer.explored:
        return size * torch.zeros_like(size).index_add(0, layer.selected, (layer.mask > 0).to(size.dtype))
    return torch.zeros(layer.bank.n_primitives, device=size.device).index_add(0, layer.selected, size)


def entropy(use: Tensor) -> Tensor:
    """Entropy of the shares, in nats."""
    share = use / use.sum().clamp_min(1e-30)
    return -(share * share.clamp_min(1e-30).log()).sum()  # torch.special.entr has no gradient at 0


def similarity(layers: Sequence[ComposedLinear]) -> Tensor:
    """Mean cosine between the uses of one bank by its layers, over pairs of them."""
    uses = nn.functional.normalize(torch.stack([use_of(layer) for layer in layers]), dim=1)
    count = len(layers)
    return ((uses @ uses.T).sum() - count) / (count * (count - 1))
