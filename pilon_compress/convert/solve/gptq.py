"""Rounding to the codes of a number format that knows what it does to the output: rows make up for those before.

    minimise  tr((W - Ŵ)ᵀ C (W - Ŵ))     Ŵ = codes · scale, row by row of W (d, m)

Once a row is rounded, the rows that are still free move by -Δ C⁻¹[i, rest] / C⁻¹[i, i], which is the best that they can
do (GPTQ, Frantar et al., 2023; Cholesky factors and blocks as there). Rows that matter most go first, against scales
that are fixed beforehand. What the error costs behind the output (G of `convert.solve.low_rank`) does not change that
move."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pilon_compress.convert.calibrate.damping import damped_cholesky, damped_inverse, damped_solve
from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.solve.bank_fit import BankFit, recompose
from pilon_compress.convert.solve.low_rank import Target, damped
from pilon_compress.nn.formats.registry import Grid, grid_of

ROWS_PER_PRODUCT = 128  # rows whose moves reach the rows behind them in one product


@dataclass
class Rounded:
    """`codes` (n, d, m) and their scales `scale` (n, groups, m), of the number format `quantization`."""

    codes: Tensor
    scale: Tensor
    quantization: str

    @property
    def values(self) -> Tensor:
        """(n, d, m) float64."""
        return self.codes.double() * grid_of(self.quantization).spread(self.scale, self.codes.shape[1]).double()

    @property
    def stored(self) -> dict[str, Tensor]:
        """Return the arguments of `Format.fill_bank`."""
        return {"codes": self.codes, "scale": self.scale}

    def pack(self, name: str) -> dict[str, Tensor]:
        """Return the quantised bank as tensors for the journal."""
        return {f"{name}.codes": self.codes, f"{name}.scale": self.scale}

    @classmethod
    def unpack(cls, name: str, tensors: Mapping[str, Tensor], quantization: str) -> "Rounded":
        """Return what `pack` stored in `tensors` under `name`."""
        return cls(tensors[f"{name}.codes"], tensors[f"{name}.scale"], quantization)


def round_rows(weight: Tensor, scale: Tensor, metric: Tensor, grid: Grid) -> Tensor:
    """Codes (d, m) for `weight` (d, m) with a scale for each of its numbers, in the `metric` (d, d)."""
    order = metric.diagonal().argsort(descending=True, stable=True)
    W, scale = weight[order].clone(), scale[order]
    inverse = damped_inverse(metric[order][:, order])
    U = damped_cholesky(inverse, upper=True)
    codes = torch.empty_like(W)
    for start in range(0, len(W), ROWS_PER_PRODUCT):
        stop = min(start + ROWS_PER_PRODUCT, len(W))
        errors = torch.empty_like(W[start:stop])
        for row in range(start, stop):
            codes[row] = grid.nearest(W[row] / scale[row])
            errors[row - start] = error = (W[row] - codes[row] * scale[row]) / U[row, row]
            W[row:stop].addr_(U[row, row:stop], error, alpha=-1)
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return torch.empty_like(codes).index_copy_(0, order, codes).to(grid.code_dtype)


def nearest(weight: Tensor, quantization: str) -> Rounded:
    """`weight` (n, d, m), every number on its own."""
    grid = grid_of(quantization)
    scale = grid.scales(weight)
    codes = grid.nearest(weight / grid.spread(scale.to(weight.dtype), weight.shape[1]))
    return Rounded(codes.to(grid.code_dtype), scale, quantization)


def round_matrix(target: Target, quantization: str) -> Rounded:
    """The target's weight as one matrix (1, d_in, d_out)."""
    grid, weight = grid_of(quantization), target.weight[None]
    scale = grid.scales(weight)
    whole = grid.spread(scale.double(), weight.shape[1])[0]
    codes = round_rows(target.weight, whole, damped(target.metric), grid)
    return Rounded(codes[None], scale, quantization)


def round_bank(
    fit: BankFit, targets: Sequence[Target], plan: BankPlan, quantization: str
) -> tuple[BankFit, Rounded, Rounded]:
    """Round the bank of `fit` for the layers that compose it: the fit with those numbers, A, and B as (n, d_out, r).

    A in the metric of the inputs. B, of a bank of one layer fitted anew to the rounded A, in that of the latent; then
    the compositions are fitted anew.
    """
    grid = grid_of(quantization)
    n, d_in, r = fit.A.shape
    inputs = torch.stack([target.metric for target in targets]).sum(0)
    columns = fit.A.permute(1, 0, 2).reshape(d_in, n * r)
    scale = grid.scales(columns[None])
    codes = round_rows(columns, grid.spread(scale.double(), d_in)[0], damped(inputs), grid)
    A = Rounded(_by_primitive(codes, n), _by_primitive(scale[0], n), quantization)
    fit = replace(fit, A=A.values)
    columns = fit.A.permute(1, 0, 2).reshape(d_in, n * r)
    gains = _gains(fit, len(targets))
    grams = [columns.T @ target.metric @ columns for target in targets]
    latent = damped(sum((g[:, None] * gram * g for g, gram in zip(gains, grams, strict=True)), grams[0] * 0))
    rows = fit.B.reshape(n * r, -1)
    if len(targets) == 1:
        ridge = latent - gains[0][:, None] * grams[0] * gains[0]
        right = gains[0][:, None] * (columns.T @ (targets[0].metric @ targets[0].weight)) + ridge @ rows
        rows = damped_solve(latent, right)
    scale = grid.scales(rows.T[None])
    whole = grid.spread(scale.double(), rows.shape[1])[0].T
    codes = round_rows(rows, whole, latent, grid)
    B = Rounded(_by_primitive(codes.T, n), _by_primitive(scale[0], n), quantization)
    fit = replace(fit, B=B.values.transpose(1, 2))
    for place, target in enumerate(targets):
        fit = fit.recomposed(place, recompose(fit, place, target, plan))
    return fit, A, B


def _by_primitive(columns: Tensor, n: int) -> Tensor:
    """(d, n·r) as (n, d, r)."""
    return columns.unflatten(1, (n, -1)).permute(1, 0, 2).contiguous()


def _gains(fit: BankFit, layers: int) -> list[Tensor]:
    """Return each layer's weight of each component (n·r,); zero where it does not select the primitive."""
    n, _, r = fit.A.shape
    found = []
    for layer in range(layers):
        g = fit.weight.new_zeros(n, r)
        g[fit.selected[layer]] = fit.weight[layer].expand(-1, r)
        found.append(g.reshape(-1))
    return found
