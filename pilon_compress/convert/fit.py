"""The joint fit: one bank for the layers of a band, each layer judged by its own two-sided metric.

    minimise  Σ_l  tr((W_l - A diag(g_l) B)ᵀ C_l (W_l - A diag(g_l) B) G_l)
    A (d_in, K)   B (K, d_out)   g (L, K), zero outside the primitives that layer l selects;   K = n·r

It starts from the layers' own best factors side by side (g one-hot, the budget-matched private solution), a saddle
that a little noise on g leaves quickly. Then in turn: g exactly (K × K systems), A and B by preconditioned conjugate
gradients. In the end each layer keeps its top-k primitives, and the private start is returned instead if the fit is
not better.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pilon_compress.convert.cluster import group
from pilon_compress.convert.factorize import Target, balance, square_root
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

    def pack(self) -> dict[str, Tensor]:
        """All of it as tensors by name."""
        lists = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("losses", "private_losses")}
        return {name: getattr(self, name) for name in ("A", "B", "selected", "weight", "energy")} | lists

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> "BankFit":
        lists = {name: tensors[name].tolist() for name in ("losses", "private_losses")}
        return cls(**{**tensors, **lists})  # type: ignore[arg-type]

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
    """The least-squares problem of one bank, in float32 and in coordinates where the mean metrics are the identity.

    Losses and final weights are computed in float64, in the original coordinates.
    """

    def __init__(self, targets: list[Target], rank: int, scalar: bool) -> None:
        self.targets, self.rank, self.scalar = targets, rank, scalar
        self.inner = [target.gradient if target.gradient is not None else _eye(target.weight.T) for target in targets]
        total = sum(target.total for target in targets)
        self.scale = 1 / total if total > 0 else 0.0
        if len(targets) > 1:
            self._whiten()

    def _whiten(self) -> None:
        self.left, self.left_inverse = square_root(_damped(torch.stack([t.metric for t in self.targets]).mean(0), 1e-3))
        self.right, self.right_inverse = square_root(_damped(torch.stack(self.inner).mean(0), 1e-3))
        L, R = self.left_inverse, self.right_inverse
        self.C = [(L @ t.metric @ L).float() for t in self.targets]
        self.G = [(self.scale * R @ gradient @ R).float() for gradient in self.inner]
        W = [(self.left @ t.weight @ self.right).float() for t in self.targets]
        self.T = [C @ weight @ G for C, weight, G in zip(self.C, W, self.G, strict=True)]

    def whitened(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (d_in, K) and B (K, d_out) in the coordinates of the fit."""
        return balance((self.left @ A).float(), (B @ self.right).float())

    def original(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The way back, to float64."""
        return balance(self.left_inverse @ A.double(), B.double() @ self.right_inverse)

    def compose(self, A: Tensor, B: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Best g (L, K) for the active primitives, and the share of the band's loss that each component removes.

        Both (L, K). A and B in float32 are in the coordinates of the fit, in float64 in the original ones.
        """
        rows, removed = [], []
        for index, target in enumerate(self.targets):
            if A.dtype == torch.float64:
                C, G = target.metric, self.scale * self.inner[index]
                T = C @ target.weight @ G
            else:
                C, G, T = self.C[index], self.G[index], self.T[index]
            gram, right = (A.T @ C @ A) * (B @ G @ B.T), ((A.T @ T) * B).sum(1)
            if self.scalar:
                n = len(active[index])
                tied = gram.reshape(n, self.rank, n, self.rank).sum((1, 3))
                weight = _solve(tied, right.reshape(n, self.rank).sum(1), active[index]).repeat_interleave(self.rank)
            else:
                weight = _solve(gram, right, active[index].repeat_interleave(self.rank))
            rows.append(weight)
            removed.append(weight * right)
        return torch.stack(rows), torch.stack(removed)

    def losses(self, A: Tensor, B: Tensor, g: Tensor) -> list[float]:
        return [t.loss((A * row) @ B) for t, row in zip(self.targets, g, strict=True)]

    def update_A(self, A: Tensor, B: Tensor, g: Tensor) -> Tensor:
        """Conjugate gradients on Σ_l C_l A H_l = Σ_l T_l Bᵀ diag(g), with H_l = diag(g) B G_l Bᵀ diag(g)."""
        H = [row[:, None] * (B @ G @ B.T) * row for row, G in zip(g, self.G, strict=True)]
        right = sum((T @ (B.T * row) for row, T in zip(g, self.T, strict=True)), torch.zeros_like(A))
        inverse = torch.linalg.inv(_damped(sum(H, torch.zeros_like(H[0])), 1e-5))

        def operator(X: Tensor) -> Tensor:
            return sum((C @ (X @ h) for C, h in zip(self.C, H, strict=True)), torch.zeros_like(X))

        return _conjugate_gradients(operator, right, A, lambda X: X @ inverse)

    def update_B(self, A: Tensor, B: Tensor, g: Tensor) -> Tensor:
        """The same for Σ_l H_l B G_l = Σ_l diag(g) Aᵀ T_l, with H_l = diag(g) Aᵀ C_l A diag(g)."""
        H = [row[:, None] * (A.T @ C @ A) * row for row, C in zip(g, self.C, strict=True)]
        right = sum(((A * row).T @ T for row, T in zip(g, self.T, strict=True)), torch.zeros_like(B))
        inverse = torch.linalg.inv(_damped(self.scale * sum(H, torch.zeros_like(H[0])), 1e-5))

        def operator(X: Tensor) -> Tensor:
            return sum((h @ X @ G for h, G in zip(H, self.G, strict=True)), torch.zeros_like(X))

        return _conjugate_gradients(operator, right, B, lambda X: inverse @ X)


def fit_bank(
    targets: list[Target],
    plan: BankPlan,
    seed: int = 0,
    sweeps: int = 24,
    tolerance: float = 2e-3,
    method: str = "pilon",
) -> BankFit:
    """Fit one bank to the `targets` of a band. Deterministic for a seed; never worse than the private start.

    `sweeps` bounds the alternations before and after the selection of primitives; a stage ends early once a sweep
    lowers the loss by less than `tolerance` of it. `method`: whose factors a bank of one layer gets.
    """
    band = Band(targets, plan.rank, plan.composition == "scalar")
    start, private_losses = private_start(band, plan, method)
    best, best_losses = start, band.losses(start.A, start.B, start.g)
    if len(targets) > 1 and band.scale * sum(private_losses) > 1e-12:
        fitted = _joint(band, start, plan, seed, sweeps, tolerance)
        losses = band.losses(fitted.A, fitted.B, fitted.g)
        if sum(losses) < sum(best_losses):
            best, best_losses = fitted, losses
    return _pack(best, plan, _usage(band, best), best_losses, private_losses)


def recompose(fit: BankFit, place: int, target: Target, plan: BankPlan) -> None:
    """Fit, in place, the composition of the `place`-th layer to another `target`; the bank stays."""
    band = Band([target], plan.rank, plan.composition == "scalar")
    n, d_in, r = fit.A.shape
    active = torch.zeros(1, n, dtype=torch.bool, device=fit.A.device)
    active[0, fit.selected[place]] = True
    g, _ = band.compose(fit.A.permute(1, 0, 2).reshape(d_in, n * r), fit.B.reshape(n * r, -1), active)
    weight = g.reshape(n, r)[fit.selected[place]]
    fit.weight[place] = weight[:, :1] if plan.composition == "scalar" else weight


def private_start(band: Band, plan: BankPlan, method: str = "pilon") -> tuple[State, list[float]]:
    """The layers' whitened SVDs side by side, each layer composing its own primitives; and their losses.

    Spare top-k slots take the primitives after a layer's own, which least squares may use or leave.
    """
    layers, n, r = len(band.targets), plan.n_primitives, plan.rank
    owned = [n // layers + (index < n % layers) for index in range(layers)]
    parts = []
    for target, count in zip(band.targets, owned, strict=True):
        A, B = target.components(method, count * r)
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
    A, B = band.whitened(start.A, start.B)
    g, _ = band.compose(A, B, everything)
    state = State(A, B, g + noise.float(), everything)
    state = _alternate(band, state, sweeps, tolerance)
    if not band.scalar:  # scalar primitives are tied already
        order = group(_usage(band, state), plan.rank, seed)
        state = State(state.A[:, order], state.B[order], state.g[:, order], everything)
    if plan.top_k < plan.n_primitives:
        _, removed = band.compose(state.A, state.B, everything)
        strength = removed.reshape(-1, plan.n_primitives, plan.rank).sum(2)
        active = torch.zeros_like(everything).scatter_(1, strength.topk(plan.top_k, dim=1).indices, True)
        g, _ = band.compose(state.A, state.B, active)
        state = _alternate(band, State(state.A, state.B, g, active), sweeps // 2, tolerance)
    A, B = band.original(state.A, state.B)
    return State(A, B, band.compose(A, B, state.active)[0], state.active)


def _alternate(band: Band, state: State, sweeps: int, tolerance: float) -> State:
    A, B, g = state.A, state.B, state.g
    previous, kept = float("inf"), state
    for _ in range(sweeps):
        B = band.update_B(A, B, g)
        A, B = balance(band.update_A(A, B, g), B)
        g, removed = band.compose(A, B, state.active)
        loss = 1 - float(removed.double().sum())  # at the least-squares optimum, of the whole band
        if loss < previous:
            kept = State(A, B, g, state.active)
        if not loss < previous * (1 - tolerance):
            break
        previous = loss
    return kept


def _usage(band: Band, state: State) -> Tensor:
    """(L, K): power of each component in each layer's output, in units of the dense output's."""
    A, B = (state.A, state.B) if state.A.dtype == torch.float64 else band.original(state.A, state.B)
    rows = []
    for target, row in zip(band.targets, state.g.double(), strict=True):
        power = float(((target.metric @ target.weight) * target.weight).sum())
        rows.append(row.square() * ((target.metric @ A) * A).sum(0) * B.square().sum(1) / max(power, 1e-300))
    return torch.stack(rows)


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


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


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
