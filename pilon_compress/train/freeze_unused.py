"""Freeze parameters that took no part in a step: neither weight decay nor momentum changes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.installed import banks, projections
from pilon_compress.optimize.callbacks import Callback


class FreezeUnused(Callback):
    """Primitives that no layer selected, components out of use, and their weights, for the length of a step."""

    def __init__(self, model: Any) -> None:
        users: dict[int, list[ComposedLinear]] = {}
        for _, layer in projections(model):
            users.setdefault(id(layer.bank), []).append(layer)
        self.users = [(bank, users[id(bank)]) for _, bank in banks(model) if id(bank) in users]

    @contextmanager
    def around(self) -> Iterator[None]:
        # copies of whole tensors: picking rows would make a GPU wait for their number
        """Restore, after a step, the values of all that took no part in it."""
        kept = [
            (parameter, parameter.detach().clone(), _spread(used, parameter))
            for bank, layers in self.users
            for parameter, used in self._parts(bank, layers)
            if parameter.grad is not None
        ]
        yield
        with torch.no_grad():
            for parameter, before, used in kept:
                parameter.copy_(torch.where(used, parameter, before))

    def _parts(self, bank: PrimitiveBank, layers: list[ComposedLinear]) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters, and a mask that broadcasts over each: what was used."""
        each = [layer.used() for layer in layers]
        rows, parts = torch.stack(each).any(0), layers[0].active()
        yield bank.A, rows[:, None, None] & parts[None, None, :]
        yield bank.B, rows[:, None, None] & parts[None, :, None]
        for layer, used in zip(layers, each, strict=True):
            if layer.weight.shape[0] == bank.n_primitives:
                yield layer.weight, used[:, None].expand(layer.weight.shape)


def _spread(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask as `torch.where` needs it beside a parameter: on every process, where that is sharded."""
    if not isinstance(parameter, DTensor):
        return mask
    placements = [Replicate()] * parameter.device_mesh.ndim
    return DTensor.from_local(mask, parameter.device_mesh, placements, run_check=False)
