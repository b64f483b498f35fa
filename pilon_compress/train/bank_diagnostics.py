"""Compute bank diagnostics during training, at every evaluation.

A bank of whole neurons counts as one of primitives: every block that uses it is a layer.

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
from torch import Tensor, nn

from pilon_compress.evaluate.bank_usage import describe
from pilon_compress.nn.installed import banks, neuron_banks, neuron_blocks, projections
from pilon_compress.nn.part import LatentPart
from pilon_compress.nn.sharded import full
from pilon_compress.nn.usage import neuron_energy, used_neurons
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.tiers.modules import gradient_of


class BankDiagnostics(Callback):
    """Callback that records which primitives get a gradient; a call returns the bank diagnostics."""

    def __init__(self, model: Any) -> None:
        self.banks = [(bank, [p for _, p in projections(model) if p.bank is bank]) for _, bank in banks(model)]
        blocks = list(neuron_blocks(model))
        self.stores = [(bank, [b for b in blocks if b["down"].bank is bank]) for _, bank in neuron_banks(model)]
        self.seen: dict[int, Tensor] = {}
        self.latent = [module for module in model.modules() if isinstance(module, LatentPart)]
        self.digits: list[Tensor] = []

    @contextmanager
    def around(self) -> Iterator[None]:
        """Add up, before a step, the gradient norm of every primitive."""
        for bank, _ in self.banks:
            if (gradient := gradient_of(bank, "B")) is not None:
                self._see(bank, gradient.norm(dim=(1, 2)))
        for store, _ in self.stores:
            if (gradient := gradient_of(store.matrix("down"), "weight")) is not None:
                self._see(store, gradient.norm(dim=0))
        yield

    def _see(self, bank: nn.Module, size: Tensor) -> None:
        self.seen[id(bank)] = self.seen[id(bank)] + size if id(bank) in self.seen else size

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The figures above, and a new count of gradients from here on."""
        found: list[dict[str, float]] = []
        for bank, layers in self.banks:
            if layers:
                used, energy = (
                    torch.stack(rows) for rows in ([p.used() for p in layers], [p.energy() for p in layers])
                )
                found.append(self._of_bank(bank, used, energy))
        for store, blocks in self.stores:
            if blocks:
                used, energy = (torch.stack([of(block) for block in blocks]) for of in (used_neurons, neuron_energy))
                found.append(self._of_bank(store, used, energy))
        self.seen = {}
        means = {key: sum(entry[key] for entry in found) / len(found) for key in found[0]} if found else {}
        return means | self._of_digits()

    def _of_bank(self, bank: nn.Module, used: Tensor, energy: Tensor) -> dict[str, float]:
        """The figures of one bank; `used`, `energy` (layers, n)."""
        each = describe(energy, used)
        whole = describe(torch.tensor(each["energy"]).sum(0, keepdim=True), used.any(0)[None])
        alive = used.any(0)
        if id(bank) in self.seen:
            alive = alive & (full(self.seen[id(bank)]).to(alive.device) > 0)
        return {
            "composition_entropy": sum(each["entropy"]) / len(used),
            "primitive_entropy": whole["entropy"][0],
            "primitive_gini": whole["gini"][0],
            "utilisation": whole["utilisation"],
            "dead_share": 1 - float(alive.double().mean()),
        }

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
