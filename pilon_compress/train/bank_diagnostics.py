"""Compute bank diagnostics during training, at every evaluation.

composition_entropy   how evenly a layer spreads its energy over its bank's primitives: 0 (one does all) to 1; mean
primitive_entropy     how evenly a bank's primitives carry the energy of all its layers: 0 to 1; mean over banks
primitive_gini        the same as inequality: 0 (all alike) to nearly 1
utilisation           share of the primitives that any layer selects
dead_share            share that no layer selects, or that had no gradient since the last look
zero_share            ternary: share of the digits that are 0
flipped_share         ternary: share that are not what they were at the last look
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pilon_compress.evaluate.bank_usage import describe
from pilon_compress.nn.installed import banks, projections
from pilon_compress.nn.part import LatentPart
from pilon_compress.nn.sharded import full
from pilon_compress.optimize.callbacks import Callback


class BankDiagnostics(Callback):
    """Callback that records which primitives get a gradient; a call returns the bank diagnostics."""

    def __init__(self, model: Any) -> None:
        self.banks = [(bank, [p for _, p in projections(model) if p.bank is bank]) for _, bank in banks(model)]
        self.seen: dict[int, Tensor] = {}
        self.latent = [module for module in model.modules() if isinstance(module, LatentPart)]
        self.digits: list[Tensor] = []

    @contextmanager
    def around(self) -> Iterator[None]:
        """Add up, before a step, the gradient norm of every primitive."""
        for bank, _ in self.banks:
            if bank.B.grad is not None:
                size = bank.B.grad.norm(dim=(1, 2))
                self.seen[id(bank)] = self.seen[id(bank)] + size if id(bank) in self.seen else size
        yield

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The figures above, and a new count of gradients from here on."""
        found: list[dict[str, float]] = []
        for bank, layers in self.banks:
            if not layers:
                continue
            used = torch.stack([layer.used() for layer in layers])
            energy = torch.stack([layer.energy() for layer in layers])
            most = int(used.sum(1).max())
            each = describe(energy, used.int().topk(most, dim=1).indices)
            whole = describe(torch.tensor(each["energy"]).sum(0, keepdim=True), used.any(0).nonzero().T)
            alive = used.any(0)
            if id(bank) in self.seen:
                alive = alive & (full(self.seen[id(bank)]) > 0)
            found.append(
                {
                    "composition_entropy": sum(each["entropy"]) / len(layers),
                    "primitive_entropy": whole["entropy"][0],
                    "primitive_gini": whole["gini"][0],
                    "utilisation": whole["utilisation"],
                    "dead_share": 1 - float(alive.double().mean()),
                }
            )
        self.seen = {}
        means = {key: sum(entry[key] for entry in found) / len(found) for key in found[0]} if found else {}
        return means | self._of_digits()

    def _of_digits(self) -> dict[str, float]:
        """Shares over all digits of the model, and a copy of them to compare with the next time."""
        before, self.digits = self.digits, [part.codes() for part in self.latent]
        count = sum(digits.numel() for digits in self.digits)
        if not count:
            return {}
        found = {"zero_share": sum(int((digits == 0).sum()) for digits in self.digits) / count}
        if before:
            pairs = zip(before, self.digits, strict=True)
            found["flipped_share"] = sum(int((old != new).sum()) for old, new in pairs) / count
        return found
