"""The projection that stays one matrix, because no composition of it pays; its block may have lost neurons."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pilon_compress.nn.part import Chosen, Matrix


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

    def forward(self, x: Tensor, chosen: Chosen | None = None, inputs: bool = False) -> Tensor:
        """Compute `Matrix.forward`; a few runs of columns or rows are read where they lie."""
        weight = self.weight  # read once: a tiered one is put together each time
        if chosen is None:
            return linear(x, weight, self.bias)
        axis = 1 if inputs else 0  # of the weight (d_out, d_in)
        if not chosen.runs:
            return linear(x, weight.index_select(axis, chosen.indices))
        parts = [weight.narrow(axis, start, end - start) for start, end in chosen.runs]
        if not inputs:
            return torch.cat([linear(x, part) for part in parts], -1)
        pieces = x.split([part.shape[1] for part in parts], -1)
        products = [linear(piece, part) for piece, part in zip(pieces, parts, strict=True)]
        return sum(products[1:], products[0])

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Fill the weight, in place, with N(0, std²)."""
        self.weight.normal_(0, std, generator=generator)
