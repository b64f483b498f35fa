"""SubLN (BitNet, Wang et al., 2023): RMSNorm of a projection's inputs, `norm.weight` (d_in,), ones at the start."""

from typing import Any

from torch import nn

from pilon_compress.nn.additions import Addition, mark, register
from pilon_compress.nn.part import Projection, linear_shape

EPS = 1e-6


class SubNorm(Addition):
    """The norm runs before the projection that it belongs to; in front of a plain module it is a layer of its own."""

    dense = "normalises the inputs of feed-forward projections, which its base architecture has no place for"

    def add(self, module: nn.Module) -> None:
        """Put an RMSNorm of the width of its input before a projection."""
        self._put(module, nn.RMSNorm(linear_shape(module)[0], eps=EPS))

    def carry(self, old: nn.Module, new: nn.Module) -> nn.Module:
        """Put the norm of `old` before `new`, which replaces it, and return the module to install."""
        norm = old.get_submodule("norm")
        if not isinstance(new, Projection):
            return nn.Sequential(norm, new)
        self._put(new, norm)
        mark(new, "bitnet", "sub_norm")
        return new

    def numbers(self, layout: Any, place: str) -> int:
        """Return the numbers that the norm stores: one for each input."""
        return int(layout.shape(place)[0])

    def _put(self, module: nn.Module, norm: nn.Module) -> None:
        module.add_module("norm", norm)
        module.register_forward_pre_hook(_normalise)


def _normalise(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return module.get_submodule("norm")(args[0]), *args[1:]


register("bitnet", {"sub_norm": SubNorm()})
