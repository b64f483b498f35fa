"""Ternary weights in training: floats that learn, of which digits and scales count, and inputs as 8-bit codes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilon_compress.kernels.reference import product, quantise
from pilon_compress.nn.bank import PrimitiveBank, Segment
from pilon_compress.nn.dense_linear import DenseLinear
from pilon_compress.nn.formats.registry import FORMATS, Format
from pilon_compress.nn.part import Chosen, LatentPart
from pilon_compress.nn.sharded import full
from pilon_compress.nn.ternary_quantizer import (
    Rounding,
    absmean,
    centred,
    digits,
    held_digits,
    restored,
    rounded,
    straight,
)


class TernaryBank(LatentPart, PrimitiveBank):
    """A bank of latent numbers, of which the forward pass sees digits and scales only (see `nn.ternary_quantizer`).

    A primitive's scale is the mean magnitude of its numbers. In training, `rounding` may be another than
    `rounded`, and `A_digits`, `B_digits` are the digits of this step, where they are held so that they are made once
    and not in every layer and micro batch.
    """

    format = "ternary"
    folds = False  # products are of integers, which folding would lose
    rounding: Rounding
    A_digits: Tensor | None
    B_digits: Tensor | None

    def __init__(self, d_in: int, d_out: int, n_primitives: int, rank: int) -> None:
        super().__init__(d_in, d_out, n_primitives, rank)
        self.rounding = rounded
        for name in ("A_digits", "B_digits"):
            self.register_buffer(name, None, persistent=False)

    def forward(
        self, x: Tensor, selected: Tensor, weight: Tensor, group: int = 0, *, segments: Sequence[Segment] = ()
    ) -> Tensor:
        """Compute `PrimitiveBank.forward`; `group`: inputs that share a scale, 0 for all of a token's."""
        if segments:
            return self.by_segment(x, selected, weight, group, segments)
        if self.training:
            return self._compose(x, selected, weight, group)
        with torch.autocast(x.device.type, enabled=False):  # half precision would round integers
            return self._compose(x, selected, weight, group)

    def _compose(self, x: Tensor, selected: Tensor, weight: Tensor, group: int) -> Tensor:
        width = selected.shape[0] * self.rank
        rounding = self.rounding if self.training else rounded
        A, B = self.digits(selected)
        A, B = A.permute(1, 0, 2).reshape(self.d_in, width), B.reshape(width, self.d_out)
        scale, shift = self.folded(selected, weight)
        codes, scales = quantise(x, group, straight(rounding))
        # one product where rounding does not matter; one for each group where kernels must agree
        u = restored(codes, scales, group) @ A if self.training and group else product(codes, scales, A, group)
        u = u * scale if shift is None else u * scale + shift
        codes, scales = quantise(u, 0, straight(rounding))
        return product(codes, scales, B).to(x.dtype)

    def scales(self) -> tuple[Tensor, Tensor]:
        """Return those of A and B, (n, 1, 1) each."""
        return absmean(self.A), absmean(self.B)

    def digits(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ternary weights of the selected primitives, (k, d_in, r) and (k, r, d_out), float32."""
        A_scale, B_scale = self.scales()
        if self.training and self.A_digits is not None and self.B_digits is not None:
            A = held_digits(self.A, self.A_digits, A_scale)
            B = held_digits(self.B, self.B_digits, B_scale)
            return A.index_select(0, selected), B.index_select(0, selected)
        rounding = self.rounding if self.training else rounded
        A = digits(self.A.index_select(0, selected), A_scale.index_select(0, selected), rounding)
        return A, digits(self.B.index_select(0, selected), B_scale.index_select(0, selected), rounding)

    def folded(self, selected: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale (k·r,), of mixed recipes (N, k·r), and shift (k·r,) or None of the latent, weight scales included."""
        A_scale, B_scale = (one.index_select(0, selected).squeeze(-1) for one in self.scales())
        factor, shift = self.affine(weight.float())
        shape = (selected.shape[0], self.rank)
        scale = A_scale.expand(shape) * factor.expand(*factor.shape[:-2], *shape) * B_scale.expand(shape)
        return scale.flatten(-2), None if shift is None else (shift.expand(shape) * B_scale).reshape(-1)

    @torch.no_grad()
    def hold(self) -> None:
        """Make the digits that the next training steps use, until they are made again."""
        A_scale, B_scale = self.scales()
        self.A_digits = _held(self.A_digits, digits(self.A, A_scale, self.rounding))
        self.B_digits = _held(self.B_digits, digits(self.B, B_scale, self.rounding))

    def codes(self) -> Tensor:
        """Return the digits of A and B in one dimension, int8, for comparisons."""
        return torch.cat([_codes(self.A), _codes(self.B)])

    @torch.no_grad()
    def centre(self, share: float) -> None:
        """Do as `LatentPart.centre` says."""
        for latent, scale in zip((self.A, self.B), self.scales(), strict=True):
            latent.copy_(centred(latent, scale, share))

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Fill A and B so that what counts of them has the standard deviation `std`: less than the floats' own."""
        super().draw(std, generator)
        everything = torch.arange(self.n_primitives, device=self.A.device)
        for latent, counted in zip((self.A, self.B), self.primitives(everything), strict=True):
            latent.mul_(std / counted.square().mean().sqrt())

    def primitives(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `selected` (k,) primitives, digits times scales: A (k, d_in, r), B (k, r, d_out)."""
        A, B = self.digits(selected)
        A_scale, B_scale = (one.index_select(0, selected) for one in self.scales())
        return A * A_scale, B * B_scale


class TernaryLinear(LatentPart, DenseLinear):
    """A dense matrix of ternary digits: one scale, the mean magnitude.

    `rounding` and `weight_digits` (d_out, d_in) are for training, as in `TernaryBank`.
    """

    format = "ternary"
    folds = False
    rounding: Rounding
    weight_digits: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool,
        host_shape: tuple[int, int],
        group: int = 0,
    ) -> None:
        super().__init__(d_in, d_out, bias, host_shape)
        self.group, self.rounding = group, rounded
        self.register_buffer("weight_digits", None, persistent=False)

    def forward(self, x: Tensor, chosen: Chosen | None = None, inputs: bool = False) -> Tensor:
        """Compute `Matrix.forward`, with `x` in 8 bits and ternary weights."""
        if self.training:
            y = self._multiply(x, chosen, inputs)
        else:
            with torch.autocast(x.device.type, enabled=False):
                y = self._multiply(x, chosen, inputs)
        return y if self.bias is None else y + self.bias

    def _multiply(self, x: Tensor, chosen: Chosen | None, inputs: bool) -> Tensor:
        rounding = self.rounding if self.training else rounded
        scale = self.scales()
        if self.training and self.weight_digits is not None:
            matrix = held_digits(self.weight, self.weight_digits, scale).T
        else:
            matrix = digits(self.weight, scale, rounding).T
        if chosen is not None:
            matrix = matrix.index_select(0 if inputs else 1, chosen.indices)
        codes, scales = quantise(x, self.group, straight(rounding))
        if self.training and self.group:
            y = restored(codes, scales, self.group) @ matrix
        else:
            y = product(codes, scales, matrix, self.group)
        return (y * scale.squeeze(-1)).to(x.dtype)

    def scales(self) -> Tensor:
        """Return the one scale of the matrix, (1, 1)."""
        return absmean(self.weight)

    def codes(self) -> Tensor:
        """Return the digits of the weight in one dimension, int8, for comparisons."""
        return _codes(self.weight)

    @torch.no_grad()
    def centre(self, share: float) -> None:
        """Do as `LatentPart.centre` says."""
        self.weight.copy_(centred(self.weight, self.scales(), share))

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Fill the matrix so that what counts of it has the standard deviation `std`."""
        super().draw(std, generator)
        self.weight.mul_(std / self.matrix().square().mean().sqrt())

    def matrix(self) -> Tensor:
        """Return the weight (d_in, d_out): digits times the scale."""
        scale = self.scales()
        return (digits(self.weight, scale) * scale).to(self.weight.dtype).T

    @torch.no_grad()
    def hold(self) -> None:
        """Compute the ternary weights once for a step, like `TernaryBank.hold`."""
        made = digits(self.weight, self.scales(), self.rounding)
        self.weight_digits = _held(self.weight_digits, made)


def _held(place: Tensor | None, made: Tensor) -> Tensor:
    """`made`, in the place of what was held before: the same tensor for all steps, so that graphs stay valid."""
    return made if place is None or place.device != made.device else place.copy_(made)


def _codes(latent: Tensor) -> Tensor:
    whole = full(latent.detach())
    return digits(whole, absmean(whole)).to(torch.int8).flatten()


class TernaryFormat(Format):
    """Floats that learn, rounded in every forward pass."""

    about = "ternary, in training"

    def kernel(self, device: str, d_in: int, group: int) -> str:
        return "torch, slow: the form in training; `pilon-compress export --to packed` makes the fast one"

    def bank(self, d_in: int, d_out: int, n_primitives: int, rank: int) -> PrimitiveBank:
        """Return a bank of latent weights, uninitialised, that computes with ternary digits."""
        return TernaryBank(d_in, d_out, n_primitives, rank)

    def matrix(self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int], group: int) -> TernaryLinear:
        """Return a matrix of latent weights, uninitialised, that computes with ternary digits."""
        return TernaryLinear(d_in, d_out, bias, host_shape, group)

    def matrix_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of the latent weights, with `itemsize` bytes for each."""
        return rows * columns * itemsize


FORMATS.add("ternary", TernaryFormat("ternary"))
