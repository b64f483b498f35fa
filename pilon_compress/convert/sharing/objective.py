"""The least-squares problem of one bank, in float32 and in coordinates where the mean metrics are the identity.

Losses and final weights are computed in float64, in the original coordinates.

Components that are fitted together may cancel: a sum of rank-one terms that several layers weigh is a PARAFAC model,
known for fits whose terms grow without bound against each other (Harshman and Lundy, 1984; de Silva and Lim, 2008).
Rounding and few bits cannot hold those, and a layer that drops one is lost. So every component pays a share,
CANCELLATION, of the power that it brings to each layer's output.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.solve.bank_fit import penalised, weigh
from pilon_compress.convert.solve.low_rank import Target, balance_factors, square_root

CG_STEPS = 3
PRECONDITIONER_DAMPING = 1e-3  # of the preconditioner, Jacobi-scaled too: components may be parallel, or dead

Operator = Callable[[Tensor], Tensor]


class Band:
    """The layers that share a bank: metrics C (d_in, d_in), G (d_out, d_out) and T = C W G of each, whitened.

    Banks have K = n·r components in primitive-major order: A (d_in, K), B (K, d_out), and g (L, K) in the layers.
    """

    def __init__(self, targets: Sequence[Target], plan: BankPlan) -> None:
        self.targets, self.plan = targets, plan
        total = sum(target.total for target in targets)
        self.scale = 1 / total if total > 0 else 0.0
        self._whiten([_eye(t.weight.T) if t.gradient is None else t.gradient for t in targets])

    def _whiten(self, gradients: list[Tensor]) -> None:
        self.left, self.left_inverse = square_root(_damped(torch.stack([t.metric for t in self.targets]).mean(0), 1e-3))
        self.right, self.right_inverse = square_root(_damped(torch.stack(gradients).mean(0), 1e-3))
        L, R = self.left_inverse, self.right_inverse
        self.C = [(L @ t.metric @ L).float() for t in self.targets]
        self.G = [(self.scale * R @ gradient @ R).float() for gradient in gradients]
        W = [(self.left @ t.weight @ self.right).float() for t in self.targets]
        self.T = [C @ weight @ G for C, weight, G in zip(self.C, W, self.G, strict=True)]

    def whitened(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (d_in, K) and B (K, d_out) in the coordinates of the fit."""
        return balance_factors((self.left @ A).float(), (B @ self.right).float())

    def original(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The way back, to float64."""
        return balance_factors(self.left_inverse @ A.double(), B.double() @ self.right_inverse)

    def compose(self, A: Tensor, B: Tensor, active: Tensor) -> Tensor:
        """Best g (L, K), in the coordinates of the fit, for the components that are active (L, K), the others zero."""
        g = torch.zeros(len(self.targets), A.shape[1], dtype=A.dtype, device=A.device)
        for index, (C, G, T) in enumerate(zip(self.C, self.G, self.T, strict=True)):
            used = active[index].nonzero()[:, 0]
            a, b = A[:, used], B[used]
            gram = penalised((a.T @ C @ a) * (b @ G @ b.T))
            g[index, used] = weigh(gram, ((a.T @ T) * b).sum(1), self.plan)
        return g

    def alternate(self, A: Tensor, B: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """B for these A and g, then A for these B and g, each by a few preconditioned conjugate gradients."""
        H = [penalised(row[:, None] * (A.T @ C @ A) * row) for row, C in zip(g, self.C, strict=True)]
        right = sum(((A * row).T @ T for row, T in zip(g, self.T, strict=True)), torch.zeros_like(B))
        left_inverse = _inverse(self.scale * sum(H, torch.zeros_like(H[0])))
        B = _conjugate_gradients(
            lambda X: sum((h @ X @ G for h, G in zip(H, self.G, strict=True)), torch.zeros_like(X)),
            right,
            B,
            lambda X: left_inverse @ X,
        )
        J = [penalised(row[:, None] * (B @ G @ B.T) * row) for row, G in zip(g, self.G, strict=True)]
        right = sum((T @ (B.T * row) for row, T in zip(g, self.T, strict=True)), torch.zeros_like(A))
        right_inverse = _inverse(sum(J, torch.zeros_like(J[0])))
        A = _conjugate_gradients(
            lambda X: sum((C @ (X @ j) for C, j in zip(self.C, J, strict=True)), torch.zeros_like(X)),
            right,
            A,
            lambda X: X @ right_inverse,
        )
        return balance_factors(A, B)


class Point:
    """The band's loss at the bank x = [A; Bᵀ] (d_in + d_out, K), g being the best for it (variable projection).

    `active` (L, K): the components that each layer uses.

    By Golub and Pereyra (1973) the gradient is then that for fixed g. All products run over the components that a
    layer uses; residuals are never formed.
    """

    def __init__(self, band: Band, x: Tensor, active: Tensor) -> None:
        self.band, self.x = band, x
        d_in = len(band.C[0])
        self.A, self.B = x[:d_in], x[d_in:].T
        self.used = [row.nonzero()[:, 0] for row in active]
        self.parts = []
        loss = 1.0
        for C, G, T, used in zip(band.C, band.G, band.T, self.used, strict=True):
            a, b = self.A[:, used], self.B[used]
            CA, BG, TB = C @ a, b @ G, T @ b.T
            M, N, right = a.T @ CA, BG @ b.T, (a * TB).sum(0)
            gram = penalised(M * N)
            g = weigh(gram, right, band.plan)
            loss += float((g.double() * (gram @ g - 2 * right).double()).sum())
            H, J = penalised(g[:, None] * M * g), penalised(g[:, None] * N * g)
            self.parts.append((g, CA, BG, TB, H, J))
        self.loss = loss

    @cached_property
    def gradient(self) -> Tensor:
        """Return the gradient of the loss with respect to x."""
        slope = torch.zeros_like(self.x)
        d_in = len(self.A)
        for T, used, (g, CA, BG, TB, H, J) in zip(self.band.T, self.used, self.parts, strict=True):
            slope[:d_in].index_add_(1, used, CA @ J - TB * g)
            slope[d_in:].index_add_(1, used, BG.T @ H - T.T @ (self.A[:, used] * g))
        return 2 * slope

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        K = self.x.shape[1]
        left, right = self.x.new_zeros(K, K), self.x.new_zeros(K, K)
        for used, (*_, H, J) in zip(self.used, self.parts, strict=True):
            place = used[:, None], used
            left[place] += J
            right[place] += self.band.scale * H
        return _inverse(2 * left), _inverse(2 * right)

    def precondition(self, z: Tensor) -> Tensor:
        """z times the inverse of the Gauss-Newton matrix without what couples A and B, for layers of equal metrics."""
        left, right = self._inverses
        d_in = len(self.A)
        return torch.cat([z[:d_in] @ left, z[d_in:] @ right])


def _inverse(gram: Tensor) -> Tensor:
    """Damped after Jacobi scaling; zero for rows of zeros."""
    scale = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(1e-30), torch.zeros_like(scale))
    scaled = inverse[:, None] * gram * inverse + PRECONDITIONER_DAMPING * _eye(gram)
    return inverse[:, None] * torch.linalg.inv(scaled) * inverse


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _damped(gram: Tensor, share: float) -> Tensor:
    """Add `share` of the mean diagonal; never exactly singular."""
    return gram + share * gram.diagonal().mean().clamp_min(1e-30) * _eye(gram)


def _conjugate_gradients(operator: Operator, right: Tensor, x: Tensor, precondition: Operator) -> Tensor:
    residual = right - operator(x)
    z = precondition(residual)
    direction, power = z, (residual * z).sum()
    for _ in range(CG_STEPS):
        image = operator(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:
            break
        step = power / curvature
        x, residual = x + step * direction, residual - step * image
        z = precondition(residual)
        renewed = (residual * z).sum()
        direction, power = z + (renewed / power.clamp_min(1e-30)) * direction, renewed
    return x
