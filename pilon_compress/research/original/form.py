"""Latent scale and bias of the original PILON: a scale and a bias per component of rank, shared by a bank's primitives.

    x (d_in) --A_p--> u (r) --[* latent_scale + latent_bias]--> --g_p--> --B_p--> y (d_out)

Packing folds the scale into the composition weight; of the bias a `shift` (k, r) stays at every packed projection.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.nn.additions import Addition, mark, register
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.formats.ternary import TernaryBank


class LatentBank(PrimitiveBank):
    """A bank with `latent_scale` (r,), `latent_bias` (r,), or both."""

    latent_scale: nn.Parameter | None
    latent_bias: nn.Parameter | None

    def affine(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return factor and shift of the latent vectors, with the learned scale and bias."""
        factor, shift = super().affine(weight)
        if self.latent_bias is not None:
            shift = weight * self.latent_bias
        return factor if self.latent_scale is None else factor * self.latent_scale, shift


class LatentTernaryBank(LatentBank, TernaryBank):
    """A ternary bank with latent options, which stay plain numbers."""


class ShiftedLinear(ComposedLinear):
    """A projection from a packed bank with `shift` (k, r) added to the latent behind its scale."""

    shift: nn.Parameter

    def compose(self, x: Tensor) -> Tensor:
        """Return x through the composition, shifted in latent space: (..., d_out)."""
        y: Tensor = self.bank(x, self.selected, self.weight, self.group, shift=self.shift)
        return y

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """Return the composition weights and the shift, both of the shape of the weights."""
        return self.weight, self.shift


class Latent(Addition):
    """`latent_scale`, ones at the start, or `latent_bias`, zeros."""

    def __init__(self, name: str) -> None:
        self.name = name

    def add(self, module: nn.Module) -> None:
        """Put a latent vector (rank,), ones for a scale and zeros for a bias, into a bank."""
        assert isinstance(module, PrimitiveBank)
        self._put(module, torch.full((module.rank,), float(self.name == "latent_scale")))

    def carry(self, old: nn.Module, new: nn.Module) -> nn.Module:
        """Give `new`, which replaces `old`, its latent vector, unless it is packed; return `new`."""
        if isinstance(new, PrimitiveBank) and not new.exact_compositions:
            self._put(new, getattr(old, self.name))
            mark(new, "original", self.name)
        return new

    def packed(self, layer: nn.Module, made: nn.Module) -> None:
        """Store the shift of `layer` in `made`, the packed projection that replaces it."""
        if self.name == "latent_bias":
            assert isinstance(layer, ComposedLinear) and isinstance(layer.bank, TernaryBank)
            _, shift = layer.bank.folded(*layer.coefficients())
            assert shift is not None
            SHIFT.put(made, shift.detach().reshape(-1, layer.bank.rank).clone())

    def numbers(self, layout: Any, place: str) -> int:
        """Return the numbers that the latent vector stores: the rank."""
        return int(layout.banks[place].rank)

    def _put(self, bank: PrimitiveBank, values: Tensor) -> None:
        latent = {PrimitiveBank: LatentBank, TernaryBank: LatentTernaryBank}
        if not isinstance(bank, LatentBank):
            if type(bank) not in latent:
                raise ValueError(f"a {type(bank).__name__} has no {self.name}")
            bank.__class__ = latent[type(bank)]
            bank.register_parameter("latent_scale", None)
            bank.register_parameter("latent_bias", None)
        setattr(bank, self.name, values if isinstance(values, nn.Parameter) else nn.Parameter(values))


class Shift(Addition):
    """The form of a latent bias at a packed projection."""

    exact = ("shift",)

    def add(self, module: nn.Module) -> None:
        """Put a shift of zeros, of the shape of the composition weights, into a projection."""
        assert isinstance(module, ComposedLinear)
        self._put(module, torch.zeros_like(module.weight))

    def put(self, module: nn.Module, values: Tensor) -> None:
        """Add a shift of those values (k, r)."""
        self._put(module, values)
        mark(module, "original", "shift")

    def numbers(self, layout: Any, place: str) -> int:
        """Return the numbers that the shift stores: top_k times the rank."""
        user = layout.projections[place]
        return int(user.top_k * layout.banks[user.bank].rank)

    def _put(self, module: nn.Module, values: Tensor) -> None:
        module.__class__ = ShiftedLinear
        module.shift = nn.Parameter(values)


SHIFT = Shift()
register("original", {name: Latent(name) for name in ("latent_scale", "latent_bias")} | {"shift": SHIFT})
