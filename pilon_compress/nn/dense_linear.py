"""The projection that stays one matrix, because no composition of it pays; its block may have lost neurons."""

import torch
from torch import Tensor, nn

from pilon_compress.nn.part import Matrix


class DenseLinear(Matrix, nn.Linear):
    """An nn.Linear in the place of a host projection of `host_shape` (d_in, d_out), at that size or smaller.

    Dropping a neuron of a feed-forward block takes a column of up (and gate) and a row of down; the function of the
    others does not change (structured pruning; which neurons go is decided in `convert.solve.neuron_pruning`).
    """

    def __init__(self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int]) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.host_shape = host_shape

    def matrix(self) -> Tensor:
        """Return the weight (d_in, d_out)."""
        return self.weight.T

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Fill the weight, in place, with N(0, std²)."""
        self.weight.normal_(0, std, generator=generator)
