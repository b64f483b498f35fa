"""The modules whose tensors a PILON checkpoint holds: banks, projections, 8-bit layers. What the rest asks of them."""

from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Part:
    """Mixin of every such module. `label`: its name in the model, for messages; "" of one that is in none."""

    label: str = ""

    def own_types(self) -> dict[str, torch.dtype]:
        """Return the tensors, by name in the module, that keep a dtype of their own, whatever that of the model."""
        return {}

    def refuse(self) -> str | None:
        """Say what is wrong with the tensors that were read, as the end of a sentence; None if nothing is."""
        return None

    def optimizer_group(self, leaf: str) -> str | None:
        """Return the group (of `optimize.optimizers.GROUPS`) that a parameter learns in; None: by its shape."""
        return None


class Projection(Part):
    """Mixin of the modules that take the place of a projection (d_in, d_out) of the dense model.

    host_shape: (d_in, d_out) of the dense model's projection, which may be larger
    """

    in_features: int
    out_features: int
    host_shape: tuple[int, int]


class Chosen(NamedTuple):
    """Inputs or outputs of a matrix: `indices` (k,) int64; `runs`: their (start, end) where these are few, else ()."""

    indices: Tensor
    runs: tuple[tuple[int, int], ...] = ()


class Matrix(Projection, metaclass=ABCMeta):
    """Mixin of the projections that are one matrix: of the dense model's size, or smaller where neurons were dropped.

    format: name in `nn.formats`   group: inputs that share a scale of a quantiser, 0 for all of a token's
    unfolds: folding replaces it by an nn.Linear, because it restores its matrix in every call
    folds: an nn.Linear computes the same
    """

    format: str = "none"
    group: int = 0
    unfolds: bool = False
    folds: bool = True

    @abstractmethod
    def forward(self, x: Tensor, chosen: Chosen | None = None, inputs: bool = False) -> Tensor:
        """Multiply `x` (..., d) with the matrix, and add the bias.

        With `chosen`, of matrices without a bias: with these columns of it, or, if they are `inputs`, these rows.
        """

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return the matrix (d_in, d_out) as it counts in the forward pass."""

    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Fill the matrix, in place, with N(0, std²); raise TypeError if it cannot learn."""
        raise TypeError(f"a matrix in {self.format} is not trained from random weights")


class LatentPart(metaclass=ABCMeta):  # not ABC: modules would have another memory layout, which `extend` refuses
    """Mixin of parts that round in training: floats that learn (latent), and codes of them that count.

    rounding: maps (floats, limit) to rounded ones, with a gradient; research gives it another
    """

    rounding: Callable[[Tensor, int], Tensor]

    @abstractmethod
    def hold(self) -> None:
        """Round the latent numbers once, for all layers and micro batches of the next training step."""

    @abstractmethod
    def codes(self) -> Tensor:
        """Return every code as it stands, int8, in one row; whole on every process."""

    @abstractmethod
    def centre(self, share: float) -> None:
        """Draw the latent numbers, in place, by a `share` of the way to what they count as; the outputs stay."""


def is_linear(module: nn.Module) -> bool:
    """Return True for an nn.Linear and a GPT-2 Conv1D, the linear projections of dense models."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an nn.Linear, a GPT-2 Conv1D (whose weight is stored (in, out)) or a projection of ours."""
    if isinstance(module, nn.Linear | Projection):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        d_in, d_out = module.get_parameter("weight").shape
        return d_in, d_out
    raise ValueError(f"{type(module).__name__} is not a linear projection")
