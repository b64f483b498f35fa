"""One weight at a time: the metric it is judged by, and its best rank-r factors in that metric."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DAMPING = 1e-2  # of the mean diagonal: orients directions that the calibration text hardly reaches (docs/log.md)


@dataclass(frozen=True)
class Target:
    """One dense weight and the metric it is judged by; everything float64.

    weight (d_in, d_out)   metric C (d_in, d_in)   total = tr(Wᵀ C W)
    loss(Ŵ) = tr((W - Ŵ)ᵀ C (W - Ŵ)): the expected squared output error per token (DRONE, Chen et al. 2021;
    SVD-LLM, Wang et al. 2024). C is the centred covariance where a bias can absorb the mean error, else the second
    moment.
    """

    name: str
    layer: int
    weight: Tensor
    metric: Tensor
    total: float

    @classmethod
    def of(cls, name: str, layer: int, weight: Tensor, moment: Tensor) -> "Target":
        """Build from a second moment (d, d), lightly damped; an all-zero moment counts every input alike."""
        mean = moment.diagonal().mean()
        eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        metric = moment + DAMPING * mean * eye if mean > 0 else eye
        return cls(name, layer, weight, metric, float(((metric @ weight) * weight).sum()))

    def loss(self, approximation: Tensor) -> float:
        """tr((W - Ŵ)ᵀ C (W - Ŵ)) for Ŵ (d_in, d_out)."""
        error = self.weight - approximation
        return float(((self.metric @ error) * error).sum())

    def relative_loss(self, approximation: Tensor) -> float:
        """Loss over the dense output's own power; 0 is exact, 1 is no better than a constant output."""
        return self.loss(approximation) / self.total if self.total > 0 else 0.0

    @cached_property
    def whitened(self) -> tuple[Tensor, Tensor]:
        """Right singular vectors (d_out, m) of R W, with RᵀR = C, and singular values² (m,), by falling value.

        W V Vᵀ with the first r columns of V is the rank-r matrix nearest to W in the metric C: the optimum of SVD-LLM
        without its Cholesky factor or any inverse, since R comes from `eigh` and the left factor is W V itself.
        """
        W, C = self.weight, self.metric
        if W.shape[1] <= W.shape[0]:  # the smaller eigenproblem is on the output side: V Σ² Vᵀ = Wᵀ C W
            values, vectors = torch.linalg.eigh(W.T @ C @ W)
            return vectors.flip(1), values.flip(0).clamp_min(0)
        values, vectors = torch.linalg.eigh(C)
        return _right_vectors(values.clamp_min(0).sqrt()[:, None] * (vectors.T @ W))

    @cached_property
    def plain(self) -> tuple[Tensor, Tensor]:
        """The same for W itself: plain SVD, which knows no activations."""
        return _right_vectors(self.weight)

    def vectors(self, method: str) -> Tensor:
        """Right singular vectors (d_out, m) that `method` (svd or whitened-svd) keeps the first of."""
        return (self.plain if method == "svd" else self.whitened)[0]

    def truncated(self, method: str, rank: int) -> Tensor:
        """Ŵ (d_in, d_out) of the given rank."""
        V = self.vectors(method)[:, :rank]
        return (self.weight @ V) @ V.T


def _right_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    _, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Vh.T, values.square()


def components(weight: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (d_in, r) = W V_r and B (r, d_out) = V_rᵀ, scaled so that each component's two vectors have equal norms."""
    V = vectors[:, :rank]
    return balance(weight @ V, V.T)


def balance(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale A (d_in, K) and B (K, d_out) so that column and row norms agree: half precision is safe then."""
    left, right = A.norm(dim=0), B.norm(dim=1)
    alive = (left > 0) & (right > 0)
    ratio = torch.where(alive, (right / left.clamp_min(1e-30)).sqrt(), torch.ones_like(left))
    return A * ratio, B / ratio[:, None]
