"""The joint fit: one bank for the layers of a band, each layer judged by its own metric.

    minimise  Σ_l  tr((W_l - A diag(g_l) B)ᵀ C_l (W_l - A diag(g_l) B)) / total_l
    A (d_in, K)   B (K, d_out)   g (L, K), zero outside the primitives that layer l selects;   K = n·r

It starts from the layers' own whitened SVDs side by side (g one-hot, the budget-matched private solution), a saddle
that a little noise on g leaves quickly. Then in turn: g and B exactly (K × K systems), A by preconditioned conjugate
gradients. In the end each layer keeps its top-k primitives, and the private start is returned instead if the fit is
not better.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pilon_compress.convert.cluster import group
from pilon_compress.convert.factorize import Target, balance, components
from pilon_compress.convert.plan import BankPlan

NOISE = 0.3  # on g at the start; without it the first ten sweeps gain next to nothing (docs/log.md)
RIDGE = {torch.float32: 1e-6, torch.float64: 1e-9}  # on Jacobi-scaled normal equations
CG_STEPS = 3

Operator = Callable[[Tensor], Tensor]


@dataclass
class BankFit:
    """A fitted bank and each layer's composition, in float64.

    A (n, d_in, r)   B (n, r, d_out)   selected (L, k)   weight (L, k, r) or (L, k, 1)
    energy (L, n): power that each primitive brings to each layer's output, in units of the dense output's
    losses, private_losses: per layer, of the fit and of the private start
    """

    A: Tensor
    B: Tensor
    selected: Tensor
    weight: Tensor
    energy: Tensor
    losses: list[float]
    private_losses: list[float]

    def approximation(self, layer: int) -> Tensor:
        """W (d_in, d_out) as composed for the `layer`-th of the band."""
        chosen = self.selected[layer]
        return torch.einsum(
            "kir,kr,kro->io", self.A[chosen], self.weight[layer].expand(-1, self.A.shape[2]), self.B[chosen]
        )


@dataclass
class State:
    """Components in primitive-major order: A (d_in, K), B (K, d_out), g (L, K), active (L, n)."""

    A: Tensor
    B: Tensor
    g: Tensor
    active: Tensor


class Band:
    """The least-squares problem of one bank, in working precision float32; losses and final weights in float64."""

    def __init__(self, targets: list[Target], rank: int, scalar: bool) -> None:
        self.targets, self.rank, self.scalar = targets, rank, scalar
        self.W = [t.weight.float() for t in targets]
        self.C = [t.metric.float() for t in targets]
        self.CW = [(t.metric @ t.weight).float() for t in targets]
        self.scale = [1 / t.total if t.total > 0 else 0.0 for t in targets]
        mean = sum((c * s for c, s in zip(self.C, self.scale, strict=True)), torch.zeros_like(self.C[0]))
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(_damped(mean, 1e-3))

    def compose(self, A: Tensor, B: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Best g (L, K) for the active primitives, and the share of the layer's output that each component explains.

        Both (L, K), in the precision of A and B: float32 within a sweep, float64 for the weights that are kept.
        """
        rows, explained = [], []
        BB = B @ B.T
        for index, target in enumerate(self.targets):
            exact = A.dtype == torch.float64
            C, W = (target.metric, target.weight) if exact else (self.C[index], self.W[index])
            CA = C @ A
            gram, right = (A.T @ CA) * BB, ((CA.T @ W) * B).sum(1)
            if self.scalar:
                n = len(active[index])
                tied = gram.reshape(n, self.rank, n, self.rank).sum((1, 3))
                weight = _solve(tied, right.reshape(n, self.rank).sum(1), active[index]).repeat_interleave(self.rank)
            else:
                weight = _solve(gram, right, active[index].repeat_interleave(self.rank))
            rows.append(weight)
            explained.append(weight * right * self.scale[index])
        return torch.stack(rows), torch.stack(explained)

    def losses(self, A: Tensor, B: Tensor, g: Tensor) -> list[float]:
        return [t.loss((A * row) @ B) for t, row in zip(self.targets, g, strict=True)]

    def relative(self, losses: list[float]) -> float:
        return sum(loss * s for loss, s in zip(losses, self.scale, strict=True))

    def update_B(self, A: Tensor, g: Tensor) -> Tensor:
        """Exact: Σ_l s_l diag(g) Aᵀ C_l A diag(g) B = Σ_l s_l diag(g) Aᵀ C_l W_l."""
        gram = torch.zeros(len(A.T), len(A.T), device=A.device)
        right = torch.zeros(len(A.T), self.W[0].shape[1], device=A.device)
        for C, CW, row, s in zip(self.C, self.CW, g, self.scale, strict=True):
            gram += s * (row[:, None] * (A.T @ (C @ A)) * row)
            right += s * (row[:, None] * (A.T @ CW))
        return torch.linalg.solve(_damped(gram, 1e-6), right)

    def update_A(self, A: Tensor, B: Tensor, g: Tensor) -> Tensor:
        """Conjugate gradient steps on Σ_l C_l A H_l = Σ_l s_l C_l W_l Bᵀ diag(g), H_l = s_l diag(g) B Bᵀ diag(g)."""
        BB = B @ B.T
        H = [s * (row[:, None] * BB * row) for row, s in zip(g, self.scale, strict=True)]
        right = sum(
            (s * (CW @ (B.T * row)) for CW, row, s in zip(self.CW, g, self.scale, strict=True)), torch.zeros_like(A)
        )
        mean = sum(H, torch.zeros_like(BB)) / max(sum(self.scale), 1e-300)
        values, vectors = torch.linalg.eigh(_damped(mean, 1e-4))
        spectrum = self.eigenvalues[:, None] * values  # the operator's, were all C_l alike

        def precondition(X: Tensor) -> Tensor:
            return self.eigenvectors @ ((self.eigenvectors.T @ X @ vectors) / spectrum) @ vectors.T

        def operator(X: Tensor) -> Tensor:
            return sum((C @ (X @ h) for C, h in zip(self.C, H, strict=True)), torch.zeros_like(X))

        return _conjugate_gradients(operator, right, A, precondition)


def fit_bank(
    targets: list[Target], plan: BankPlan, seed: int = 0, sweeps: int = 24, tolerance: float = 2e-3
) -> BankFit:
    """Fit one bank to the `targets` of a band. Deterministic for a seed; never worse than the private start.

    `sweeps` bounds the alternations before and after the selection of primitives; a stage ends early once a sweep
    lowers the loss by less than `tolerance` of it. The loss compared with the private start is both the sum of
    relative losses, which is minimised, and the plain sum over the band.
    """
    band = Band(targets, plan.rank, plan.composition == "scalar")
    start, private_losses = private_start(band, plan)
    best, best_losses = start, band.losses(start.A, start.B, start.g)
    if len(targets) > 1 and band.relative(private_losses) > 1e-12 * len(targets):
        fitted = _joint(band, start, plan, seed, sweeps, tolerance)
        losses = band.losses(fitted.A, fitted.B, fitted.g)
        if band.relative(losses) < band.relative(best_losses) and sum(losses) < sum(best_losses):
            best, best_losses = fitted, losses
    return _pack(best, plan, _usage(band, best), best_losses, private_losses)


def private_start(band: Band, plan: BankPlan) -> tuple[State, list[float]]:
    """The layers' whitened SVDs side by side, each layer composing its own primitives; and their losses.

    Spare top-k slots take the primitives after a layer's own, which least squares may use or leave.
    """
    layers, n, r = len(band.targets), plan.n_primitives, plan.rank
    owned = [n // layers + (index < n % layers) for index in range(layers)]
    parts = []
    for target, count in zip(band.targets, owned, strict=True):
        A, B = components(target.weight, target.vectors("whitened-svd"), count * r)
        short = count * r - A.shape[1]  # more components than the matrix has directions
        parts.append((torch.nn.functional.pad(A, (0, short)), torch.nn.functional.pad(B, (0, 0, 0, short))))
    A, B = torch.cat([a for a, _ in parts], 1), torch.cat([b for _, b in parts])
    owner = torch.repeat_interleave(torch.arange(layers), torch.tensor(owned)).to(A.device)
    own = owner == torch.arange(layers, device=A.device)[:, None]
    onehot = own.repeat_interleave(r, dim=1).double()
    private_losses = band.losses(A, B, onehot)
    active = torch.zeros_like(own)
    for index in range(layers):
        first = int(own[index].nonzero()[0, 0]) if own[index].any() else 0
        active[index, (first + torch.arange(plan.top_k, device=A.device)) % n] = True
    g, _ = band.compose(A, B, active)
    composed = band.losses(A, B, g)
    for index in range(layers):  # rounding in least squares must not spoil an exact private solution
        if composed[index] > private_losses[index] and bool((own[index] <= active[index]).all()):
            g[index] = onehot[index]
    return State(A, B, g, active), private_losses


def _joint(band: Band, start: State, plan: BankPlan, seed: int, sweeps: int, tolerance: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    everything = torch.ones_like(start.active)
    noise = NOISE * torch.randn(start.g.shape, generator=generator).to(start.g.device)
    if band.scalar:
        noise = noise[:, :: plan.rank].repeat_interleave(plan.rank, dim=1)
    state = State(start.A.float(), start.B.float(), (start.g + noise).float(), everything)
    state = _alternate(band, state, sweeps, tolerance)
    if not band.scalar:  # scalar primitives are tied already
        order = group(_usage(band, state), plan.rank, seed)
        state = State(state.A[:, order], state.B[order], state.g[:, order], everything)
    if plan.top_k < plan.n_primitives:
        _, explained = band.compose(state.A, state.B, everything)
        strength = explained.reshape(-1, plan.n_primitives, plan.rank).sum(2)
        active = torch.zeros_like(everything).scatter_(1, strength.topk(plan.top_k, dim=1).indices, True)
        g, _ = band.compose(state.A, state.B, active)
        state = _alternate(band, State(state.A, state.B, g, active), sweeps // 2, tolerance)
    A, B = state.A.double(), state.B.double()
    return State(A, B, band.compose(A, B, state.active)[0], state.active)


def _alternate(band: Band, state: State, sweeps: int, tolerance: float) -> State:
    A, B, g = state.A, state.B, state.g
    previous, kept = float("inf"), state
    for _ in range(sweeps):
        B = band.update_B(A, g)
        A, B = balance(band.update_A(A, B, g), B)
        g, explained = band.compose(A, B, state.active)
        loss = len(g) - float(explained.double().sum())  # at the least-squares optimum, relative and summed over layers
        if loss < previous:
            kept = State(A, B, g, state.active)
        if not loss < previous * (1 - tolerance):
            break
        previous = loss
    return kept


def _usage(band: Band, state: State) -> Tensor:
    """(L, K): power of each component in each layer's output, in units of the dense output's."""
    A, B = state.A.float(), state.B.float()
    power = torch.stack([s * ((C @ A) * A).sum(0) for C, s in zip(band.C, band.scale, strict=True)])
    return state.g.float().square() * power * B.square().sum(1)


def _pack(state: State, plan: BankPlan, usage: Tensor, losses: list[float], private_losses: list[float]) -> BankFit:
    n, r, layers = plan.n_primitives, plan.rank, len(losses)
    selected = torch.stack([row.nonzero()[:, 0] for row in state.active])
    weight = state.g.reshape(layers, n, r).gather(1, selected[:, :, None].expand(-1, -1, r))
    if plan.composition == "scalar":
        weight = weight[:, :, :1]
    A = state.A.reshape(-1, n, r).permute(1, 0, 2).contiguous()
    energy = usage.reshape(layers, n, r).sum(2)
    return BankFit(A, state.B.reshape(n, r, -1), selected, weight, energy, losses, private_losses)


def _solve(gram: Tensor, right: Tensor, chosen: Tensor) -> Tensor:
    """Least squares over the chosen unknowns, the others zero; after Jacobi scaling one ridge fits strong and weak."""
    gram, rhs = gram[chosen][:, chosen], right[chosen]
    scale = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(1e-30), torch.zeros_like(scale))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scaled = inverse[:, None] * gram * inverse + RIDGE[gram.dtype] * eye
    solution = torch.zeros_like(right)
    solution[chosen] = inverse * torch.linalg.solve(scaled, inverse * rhs)
    return solution


def _damped(gram: Tensor, share: float) -> Tensor:
    """Add `share` of the mean diagonal; never exactly singular."""
    shift = share * gram.diagonal().mean().clamp_min(1e-30)
    return gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


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
