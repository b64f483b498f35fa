"""Compute the metric of one weight, and its best rank-r factors in that metric."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pilon_compress.convert.solve.eigen import eigenvalues, eigenvectors

METRIC_DAMPING = 1e-2  # of the mean diagonal: orients directions that the calibration text hardly reaches (docs/log.md)


def damped(moment: Tensor) -> Tensor:
    """A second moment (d, d), lightly damped, in float64; an all-zero moment counts every direction alike."""
    moment = moment.to(torch.float64, copy=True)
    mean = moment.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    moment.diagonal().add_(METRIC_DAMPING * mean)
    return moment


def square_root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁻¹, both symmetric, with R R = metric (d, d). By `eigh`, which cannot fail as Cholesky does."""
    values, vectors = eigenvectors(metric)
    root = values.clamp_min(values[-1] * 1e-12).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def factor(metric: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁻¹ with Rᵀ R = metric (d, d): the transpose of its Cholesky factor, a tenth of the cost of `eigh`.

    A metric that is singular, or almost, gets `square_root`.
    """
    lower, failed = torch.linalg.cholesky_ex(metric)
    pivots = lower.diagonal()
    if int(failed) or not pivots.min() > 1e-6 * pivots.max():
        return square_root(metric)
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
    )
    return lower.T, inverse.T


@dataclass(frozen=True)
class Target:
    """A dense weight and the metric of its approximation; everything float64.

    weight (d_in, d_out)   metric C (d_in, d_in)   gradient G (d_out, d_out), None for the identity
    loss(Ŵ) = tr((W - Ŵ)ᵀ C (W - Ŵ) G). With G = I it is the expected squared output error per token (DRONE, Chen et
    al. 2021; SVD-LLM, Wang et al. 2024), with the output gradients' second moment the model's own loss to second order
    (`convert.calibrate.second_moments`). C is the centred covariance where a bias can absorb the mean error, else the
    second moment."""

    name: str
    layer: int
    weight: Tensor
    metric: Tensor
    gradient: Tensor | None = None
    metric_root: tuple[Tensor, Tensor] | None = None
    gradient_root: tuple[Tensor, Tensor] | None = None
    """`factor` of each, where the caller has it already: many targets share a metric."""

    @classmethod
    def of(cls, name: str, layer: int, weight: Tensor, moment: Tensor, gradient: Tensor | None = None) -> "Target":
        """Build from second moments, lightly damped."""
        return cls(name, layer, weight, damped(moment), None if gradient is None else damped(gradient))

    @cached_property
    def total(self) -> float:
        """Loss of the zero matrix: tr(Wᵀ C W G)."""
        return self.loss(torch.zeros_like(self.weight))

    def loss(self, approximation: Tensor) -> float:
        """tr((W - Ŵ)ᵀ C (W - Ŵ) G) for Ŵ (d_in, d_out)."""
        error = self.weight - approximation
        weighed = error if self.gradient is None else error @ self.gradient
        return float(((self.metric @ error) * weighed).sum())

    def output_loss(self, approximation: Tensor) -> float:
        """Squared output error over the dense output's own power (G = I), which every method is reported by.

        0 is exact, 1 is no better than a constant output.
        """
        error = self.weight - approximation
        return float(((self.metric @ error) * error).sum()) / self.power if self.power > 0 else 0.0

    def truncation_loss(self, method: str, rank: int) -> float:
        """`output_loss` of the truncation to `rank` by svd or whitened-svd, without multiplying it out.

        With V the right singular vectors that stay it is 1 - |R W V|² / |R W|².
        """
        if not self.power > 0:
            return 0.0
        if method == "whitened-svd":
            return float(self.spectrum[rank:].sum()) / self.power
        V = self.plain[0][:, :rank]
        return 1 - float(((self.weight @ V) * (self._product @ V)).sum()) / self.power

    @cached_property
    def power(self) -> float:
        """The dense output's own: tr(Wᵀ C W)."""
        return float((self._product * self.weight).sum())

    @cached_property
    def _product(self) -> Tensor:
        return self.metric @ self.weight

    @cached_property
    def two_sided(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (d_in, m), B (m, d_out) and the loss that each of the m components saves, largest first.

        The first r components are the best rank-r factors in the metric: with C = Rᵀ R and G = Sᵀ S, R W Sᵀ = U Σ Vᵀ,
        and either A = R⁻¹ U, B = Uᵀ R W or A = W Sᵀ V, B = Vᵀ S⁻ᵀ. Only the smaller side is ever decomposed, so the
        cost is that of its cube.
        """
        W, G = self.weight, self.gradient
        if W.shape[0] <= W.shape[1]:
            root, inverse = self.metric_root or factor(self.metric)
            X = root @ W
            U, values = _eigenvectors(X @ X.T if G is None else X @ G @ X.T)
            return inverse @ U, U.T @ X, values
        if G is None:
            V, values = _eigenvectors(W.T @ self._product)
            return W @ V, V.T, values
        root, inverse = self.gradient_root or factor(G)
        V, values = _eigenvectors(root @ (W.T @ self._product) @ root.T)
        return W @ (root.T @ V), V.T @ inverse.T, values

    @property
    def savings(self) -> Tensor:
        """The last part of `two_sided` alone: eigenvalues without vectors cost a fraction."""
        W, G = self.weight, self.gradient
        if G is None or "two_sided" in self.__dict__:
            return self.two_sided[2]
        if W.shape[0] <= W.shape[1]:
            X = (self.metric_root or factor(self.metric))[0] @ W
            square = X @ G @ X.T
        else:
            root = (self.gradient_root or factor(G))[0]
            square = root @ (W.T @ self._product) @ root.T
        return eigenvalues(square).flip(0).clamp_min(0)

    @cached_property
    def spectrum(self) -> Tensor:
        """The last part of `whitened` alone (m,): output power by component, largest first."""
        W = self.weight
        if W.shape[1] <= W.shape[0]:
            square = W.T @ self._product
        else:
            X = (self.metric_root or factor(self.metric))[0] @ W
            square = X @ X.T
        return eigenvalues(square).flip(0).clamp_min(0)

    @cached_property
    def whitened(self) -> tuple[Tensor, Tensor]:
        """Right singular vectors (d_out, m) of R W, with RᵀR = C, and singular values² (m,), by falling value.

        W V Vᵀ with the first r columns of V is the rank-r matrix nearest to W in the metric C: the optimum of SVD-LLM
        without any inverse, since the left factor is W V itself.
        """
        W = self.weight
        if W.shape[1] <= W.shape[0]:  # the smaller eigenproblem is on the output side: V Σ² Vᵀ = Wᵀ C W
            return _eigenvectors(W.T @ self._product)
        return _right_vectors((self.metric_root or factor(self.metric))[0] @ W)

    @cached_property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the right singular vectors of W itself, for plain SVD, which ignores activations."""
        return _right_vectors(self.weight)

    def components(self, method: str, rank: int) -> tuple[Tensor, Tensor]:
        """A (d_in, r) and B (r, d_out) of the best rank r by `method`: svd, whitened-svd, or pilon (two-sided)."""
        if method == "pilon":
            A, B, _ = self.two_sided
            return balance_factors(A[:, :rank], B[:rank])
        V = (self.plain if method == "svd" else self.whitened)[0][:, :rank]
        return balance_factors(self.weight @ V, V.T)

    def truncated(self, method: str, rank: int) -> Tensor:
        """Ŵ (d_in, d_out) of the given rank."""
        A, B = self.components(method, rank)
        return A @ B


def _right_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors and singular values² by `eigh` of the smaller side's Gram matrix, many times as fast as
    `svd`. Directions below 1e-8 of the largest, which rounding makes, come out shorter than one."""
    if matrix.shape[1] <= matrix.shape[0]:
        return _eigenvectors(matrix.T @ matrix)
    U, values = _eigenvectors(matrix @ matrix.T)
    return matrix.T @ U / values.clamp_min(values[0] * 1e-16).clamp_min(1e-300).sqrt(), values


def _eigenvectors(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues, largest first."""
    values, vectors = eigenvectors(square)
    return vectors.flip(1), values.flip(0).clamp_min(0)


def balance_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale A (d_in, K) and B (K, d_out) so that column and row norms agree: half precision is safe then."""
    left, right = A.norm(dim=0), B.norm(dim=1)
    alive = (left > 0) & (right > 0)
    ratio = torch.where(alive, (right / left.clamp_min(1e-30)).sqrt(), torch.ones_like(left))
    return A * ratio, B / ratio[:, None]
