"""Hold the results of a conversion: weights of every projection with their errors, and the shared banks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pilon_compress.convert.plan import BankPlan, NeuronBankPlan, Plan
from pilon_compress.convert.solve.bank_fit import BankFit, Own
from pilon_compress.convert.solve.gptq import Rounded
from pilon_compress.convert.solve.neuron_fit import NeuronFit, NeuronPart


@dataclass(frozen=True)
class SolvedBank:
    """A bank's fit; where its numbers are integers, those of A, and of B as (n, d_out, r)."""

    fit: BankFit
    A: Rounded | None = None
    B: Rounded | None = None

    def pack(self) -> dict[str, Tensor]:
        """Return all of it as tensors by name, for the journal."""
        found = {f"fit.{key}": tensor for key, tensor in self.fit.pack().items()}
        for side in (self.A, self.B):
            found |= {} if side is None else side.pack("A" if side is self.A else "B")
        return found

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], quantization: str | None) -> "SolvedBank":
        """Read what `pack` returned."""
        fit = BankFit.unpack(_below(tensors, "fit."))
        if quantization is None:
            return cls(fit)
        return cls(fit, *(Rounded.unpack(side, tensors, quantization) for side in "AB"))


@dataclass(frozen=True)
class Weights:
    """A projection's weights: a `matrix` (d_in, d_out), or a `bank` of its own, or a `composition` of a shared bank.

    composition (k, r) or (k, 1)   own: primitives of the shared bank that no other layer selects
    rounded: the integers of the matrix, where it is in integers
    neurons: the layer's own part, where the projection uses a bank of neurons
    """

    matrix: Tensor | None = None
    rounded: Rounded | None = None
    bank: SolvedBank | None = None
    composition: Tensor | None = None
    own: Own | None = None
    neurons: NeuronPart | None = None

    def pack(self) -> dict[str, Tensor]:
        """Return all of it as tensors by name, for the journal."""
        parts = {"matrix": self.matrix, "composition": self.composition}
        found = {name: tensor for name, tensor in parts.items() if tensor is not None}
        found |= {} if self.rounded is None else self.rounded.pack("rounded")
        found |= {} if self.bank is None else {f"bank.{key}": tensor for key, tensor in self.bank.pack().items()}
        for name, part in (("own", self.own), ("neurons", self.neurons)):
            found |= {} if part is None else {f"{name}.{key}": tensor for key, tensor in part._asdict().items()}
        return found

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], quantization: str | None) -> "Weights":
        """Read what `pack` returned."""
        matrix, bank = tensors.get("matrix"), _below(tensors, "bank.")
        rounded = None
        if matrix is not None and quantization is not None:
            rounded = Rounded.unpack("rounded", tensors, quantization)
        own, neurons = _below(tensors, "own."), _below(tensors, "neurons.")
        return cls(
            matrix,
            rounded,
            SolvedBank.unpack(bank, quantization) if bank else None,
            tensors.get("composition"),
            Own(**own) if own else None,
            NeuronPart(**neurons) if neurons else None,
        )

    def stored_as(self, dtypes: Iterable[torch.dtype]) -> "Weights":
        """Return them with matrix and primitives rounded to each of `dtypes` in turn: float64 of a model is large."""
        if self.matrix is not None:
            return replace(self, matrix=_rounded_to(self.matrix, dtypes))
        if self.neurons is not None:
            return replace(self, neurons=self.neurons._replace(own=_rounded_to(self.neurons.own, dtypes)))
        if self.bank is None:
            return self
        fit = self.bank.fit
        fit = replace(fit, A=_rounded_to(fit.A, dtypes), B=_rounded_to(fit.B, dtypes))
        return replace(self, bank=replace(self.bank, fit=fit))


@dataclass(frozen=True)
class SolvedProjection:
    """A converted projection: its weights, bias (d_out,), and errors.

    errors: by method, the relative squared output error on the dense model's own inputs
    spectrum: output power of each component of the whitened dense weight, largest first
    """

    weights: Weights
    bias: Tensor | None
    errors: dict[str, float]
    spectrum: Tensor

    def pack(self) -> dict[str, Tensor]:
        """Return all of it as tensors by name, for the journal."""
        found = {f"error.{method}": torch.tensor(error, dtype=torch.float64) for method, error in self.errors.items()}
        found |= {"spectrum": self.spectrum} | ({} if self.bias is None else {"bias": self.bias})
        return found | {f"weights.{key}": tensor for key, tensor in self.weights.pack().items()}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], quantization: str | None) -> "SolvedProjection":
        """Read what `pack` returned."""
        weights = Weights.unpack(_below(tensors, "weights."), quantization)
        errors = {method: float(error) for method, error in _below(tensors, "error.").items()}
        return cls(weights, tensors.get("bias"), errors, tensors["spectrum"])


def _rounded_to(tensor: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor:
    for dtype in dtypes:
        tensor = tensor.to(dtype)
    return tensor.clone()  # a view would hold on to all of what it is a part of


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


SolvedLayer = dict[str, SolvedProjection]  # by `Site.name`


def pack_layer(layer: SolvedLayer) -> dict[str, Tensor]:
    """Return a layer's projections as tensors by name, for the journal."""
    return {f"{name}/{key}": tensor for name, one in layer.items() for key, tensor in one.pack().items()}


def unpack_layer(tensors: Mapping[str, Tensor], quantization: str | None) -> SolvedLayer:
    """Read what `pack_layer` returned."""
    names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
    return {name: SolvedProjection.unpack(_below(tensors, f"{name}/"), quantization) for name in names}


@dataclass(frozen=True)
class Solved:
    """The converted projections by `Site.name`, the banks by name, and the banks of neurons by name."""

    projections: dict[str, SolvedProjection]
    banks: dict[str, SolvedBank]
    stores: dict[str, NeuronFit] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plan: Plan,
        layers: Iterable[SolvedLayer],
        shared: Mapping[str, SolvedBank],
        neurons: Mapping[str, NeuronFit],
    ) -> "Solved":
        """Put layers together with the banks that they share."""
        projections = {name: one for layer in layers for name, one in layer.items()}
        stores = {store.name: _store(store, projections, neurons[store.name]) for store in plan.neuron_banks}
        return cls(projections, {bank.name: _bank(bank, projections, shared) for bank in plan.banks}, stores)

    @property
    def errors(self) -> dict[str, dict[str, float]]:
        """Relative squared output error by `Site.name` and method."""
        return {name: one.errors for name, one in self.projections.items()}


def _bank(plan: BankPlan, projections: SolvedLayer, shared: Mapping[str, SolvedBank]) -> SolvedBank:
    """A bank with the compositions of its layers."""
    found = shared.get(plan.name) or projections[plan.sites[0].name].weights.bank
    assert found is not None
    for place, site in enumerate(plan.sites):
        weights = projections[site.name].weights
        if weights.composition is not None:
            found = replace(found, fit=found.fit.recomposed(place, weights.composition, weights.own))
    return found


def _store(plan: NeuronBankPlan, projections: SolvedLayer, fit: NeuronFit) -> NeuronFit:
    """A bank of neurons with those that single layers have fitted for themselves."""
    sites = {site.name: site for site in plan.sites}
    parts = {name: projections[name].weights.neurons for name in sites}
    return fit.completed({name: part for name, part in parts.items() if part is not None}, sites)
