"""Banks as their layers compose from them: each layer's own best factors, and the best composition of a given bank.

    W_l ≈ A diag(g_l) B       A (d_in, K)   B (K, d_out)   g_l (K,), zero outside the primitives of layer l;   K = n·r

Components are in primitive-major order. Layers that share more than they own are fitted jointly (`convert.sharing`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.solve.low_rank import Target

EXACT = 1e-9  # loss of a layer over the zero matrix's, below which its primitives are those of the dense weight
REFITS = 2  # rounds of private primitives and composition
CANCELLATION = 1e-2  # of each component's own power, paid in joint fits: see `sharing.objective`
RIDGE = {torch.float32: 1e-6, torch.float64: 1e-9}  # on Jacobi-scaled normal equations


@dataclass(frozen=True)
class BankFit:
    """A fitted bank and each layer's composition, float64.

    A (n, d_in, r)   B (n, r, d_out)   selected (L, k)   weight (L, k, r) or (L, k, 1)
    energy (L, n): power that each primitive brings to each layer's output, in units of the dense output's
    losses, private_losses: per layer, of the fit and of the layers' own factors
    """

    A: Tensor
    B: Tensor
    selected: Tensor
    weight: Tensor
    energy: Tensor
    losses: list[float]
    private_losses: list[float]

    def pack(self) -> dict[str, Tensor]:
        """Return all of it as tensors by name, for the journal."""
        lists = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("losses", "private_losses")}
        return {name: getattr(self, name) for name in ("A", "B", "selected", "weight", "energy")} | lists

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor]) -> "BankFit":
        """Read what `pack` returned."""
        lists = {name: tensors[name].tolist() for name in ("losses", "private_losses")}
        return cls(**{**tensors, **lists})  # type: ignore[arg-type]

    def approximation(self, place: int) -> Tensor:
        """Compose W (d_in, d_out) for the `place`-th layer of the band."""
        chosen = self.selected[place]
        return torch.einsum(
            "kir,kr,kro->io", self.A[chosen], self.weight[place].expand(-1, self.A.shape[2]), self.B[chosen]
        )

    def recomposed(self, place: int, weight: Tensor, own: "Own | None" = None) -> "BankFit":
        """Return the fit with another composition weight (k, r) or (k, 1) for the `place`-th layer, and its `own`."""
        changed = self.weight.clone()
        changed[place] = weight
        if own is None:
            return replace(self, weight=changed)
        A, B = self.A.clone(), self.B.clone()
        A[own.places], B[own.places] = own.A, own.B
        return replace(self, A=A, B=B, weight=changed)

    def own(self, place: int) -> Tensor:
        """Return the primitives (p,) that the `place`-th layer alone selects."""
        users = torch.zeros(len(self.A), dtype=torch.long, device=self.A.device)
        for row in self.selected:
            users[row] += 1
        mine = self.selected[place]
        return mine[users[mine] == 1]


class Own(NamedTuple):
    """Primitives that one layer alone selects, fitted behind the converted layers before it.

    places (p,) in the bank   A (p, d_in, r)   B (p, r, d_out)
    """

    places: Tensor
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Factors:
    """Components of a bank: A (d_in, K), B (K, d_out), g (L, K), active (L, K): those that each layer uses."""

    A: Tensor
    B: Tensor
    g: Tensor
    active: Tensor


def fit_private(targets: Sequence[Target], plan: BankPlan, method: str = "pilon") -> BankFit:
    """Fill a bank with its layers' own best factors by `method`: svd, whitened-svd or pilon (two-sided)."""
    if len(targets) == plan.n_primitives == 1 and method == "pilon":
        return _alone(targets[0], plan)
    factors, private_losses = private_factors(targets, plan, method)
    return packed(targets, factors, plan, losses(targets, factors), private_losses)


def _alone(target: Target, plan: BankPlan) -> BankFit:
    """Return the fit of one primitive to one layer: the target's best factors, and the loss by its eigenvalues."""
    A, B = _padded(target, "pilon", plan.rank)
    power = (((target.metric @ A) * A).sum(0) * B.square().sum(1)).sum() / max(target.power, 1e-300)
    loss = [float(target.two_sided[2][plan.rank :].sum())]
    weight = A.new_ones(1, 1, 1 if plan.composition == "scalar" else plan.rank)
    selected = torch.zeros(1, 1, dtype=torch.long, device=A.device)
    return BankFit(A[None], B[None], selected, weight, power.reshape(1, 1), loss, loss)


def _padded(target: Target, method: str, count: int) -> tuple[Tensor, Tensor]:
    """`count` components, zeros beyond the directions that the matrix has."""
    A, B = target.components(method, count)
    short = count - A.shape[1]
    return pad(A, (0, short)), pad(B, (0, 0, 0, short))


def private_factors(targets: Sequence[Target], plan: BankPlan, method: str = "pilon") -> tuple[Factors, list[float]]:
    """The layers' own best factors side by side, each layer composing its own primitives; and their losses.

    Spare top-k slots take primitives of the layers after, in a ring, the weakest first: those have least to lose by
    becoming something else, and serve two layers best (docs/log.md). Least squares may use or leave them.
    """
    layers, n, r = len(targets), plan.n_primitives, plan.rank
    owned = [n // layers + (index < n % layers) for index in range(layers)]
    parts = [_padded(target, method, count * r) for target, count in zip(targets, owned, strict=True)]
    A, B = torch.cat([a for a, _ in parts], 1), torch.cat([b for _, b in parts])
    owner = torch.repeat_interleave(torch.arange(layers), torch.tensor(owned)).to(A.device)
    own = owner == torch.arange(layers, device=A.device)[:, None]
    active = torch.zeros_like(own)
    for index in range(layers):
        others = [own[(index + step) % layers].nonzero()[:, 0].flip(0) for step in range(1, layers)]
        active[index, torch.cat([own[index].nonzero()[:, 0], *others])[: plan.top_k]] = True
    own, active = own.repeat_interleave(r, dim=1), active.repeat_interleave(r, dim=1)
    onehot = own.double()
    private_losses = losses(targets, Factors(A, B, onehot, own))
    g = compose(targets, A, B, active, plan)
    composed = losses(targets, Factors(A, B, g, active))
    for index in range(layers):  # rounding in least squares must not spoil an exact private solution
        if composed[index] > private_losses[index] and bool((own[index] <= active[index]).all()):
            g[index] = onehot[index]
    return Factors(A, B, g, active), private_losses


def losses(targets: Sequence[Target], factors: Factors) -> list[float]:
    """Return each layer's loss in its own metric."""
    return [t.loss((factors.A * row) @ factors.B) for t, row in zip(targets, factors.g, strict=True)]


def compose(targets: Sequence[Target], A: Tensor, B: Tensor, active: Tensor, plan: BankPlan) -> Tensor:
    """Solve for the best g (L, K), float64, with the components that are active (L, K); the others are zero."""
    total = sum(target.total for target in targets)
    scale = 1 / total if total > 0 else 0.0
    g = torch.zeros(len(targets), A.shape[1], dtype=A.dtype, device=A.device)
    for index, target in enumerate(targets):
        gradient = torch.eye(B.shape[1], dtype=B.dtype, device=B.device)
        C, G = target.metric, scale * (gradient if target.gradient is None else target.gradient)
        T = C @ target.weight @ G
        used = active[index].nonzero()[:, 0]
        a, b = A[:, used], B[used]
        g[index, used] = weigh((a.T @ C @ a) * (b @ G @ b.T), ((a.T @ T) * b).sum(1), plan)
    return g


def refit(fit: BankFit, place: int, target: Target, plan: BankPlan) -> tuple[Tensor, Own | None]:
    """Fit the `place`-th layer's composition, and the primitives that it alone selects, to another `target`.

    In turn: those primitives become the best factors of what the shared ones leave, and the composition of all is
    fitted. Shared primitives stay: other layers count on them. Never worse than the composition alone.
    """
    places = fit.own(place)
    weight = recompose(fit, place, target, plan)
    if not len(places) or fit.losses[place] <= EXACT * target.total:  # what is exact would only learn the text's noise
        return weight, None
    best: tuple[Tensor, Own | None] = (weight, None)
    least = target.loss(fit.recomposed(place, weight).approximation(place))
    mine, r = torch.isin(fit.selected[place], places), fit.A.shape[2]
    for _ in range(REFITS):
        shared = fit.recomposed(place, weight.masked_fill(mine[:, None], 0.0)).approximation(place)
        A, B = _padded(replace(target, weight=target.weight - shared), "pilon", len(places) * r)
        own = Own(places, A.reshape(len(A), -1, r).permute(1, 0, 2).contiguous(), B.reshape(-1, r, B.shape[1]))
        fit = fit.recomposed(place, weight, own)
        weight = recompose(fit, place, target, plan)
        loss = target.loss(fit.recomposed(place, weight).approximation(place))
        if loss < least:
            best, least = (weight, own), loss
    return best


def recompose(fit: BankFit, place: int, target: Target, plan: BankPlan) -> Tensor:
    """Fit the composition of the `place`-th layer to another `target`: weight (k, r), or (k, 1) where scalar."""
    n, d_in, r = fit.A.shape
    active = torch.zeros(1, n, dtype=torch.bool, device=fit.A.device)
    active[0, fit.selected[place]] = True
    active = active.repeat_interleave(r, dim=1)
    g = compose([target], fit.A.permute(1, 0, 2).reshape(d_in, n * r), fit.B.reshape(n * r, -1), active, plan)
    weight = g.reshape(n, r)[fit.selected[place]]
    return weight[:, :1] if plan.composition == "scalar" else weight


def penalised(gram: Tensor) -> Tensor:
    """Return a Gram matrix of components (K, K), each of which also pays CANCELLATION of its own power."""
    return gram + CANCELLATION * gram.diagonal().diag()


def weigh(gram: Tensor, right: Tensor, plan: BankPlan) -> Tensor:
    """Solve the normal equations of some primitives' components; their weights are tied within each where scalar."""
    if plan.composition != "scalar":
        return _least_squares(gram, right)
    n = len(right) // plan.rank
    tied = gram.reshape(n, plan.rank, n, plan.rank).sum((1, 3))
    return _least_squares(tied, right.reshape(n, plan.rank).sum(1)).repeat_interleave(plan.rank)


def _least_squares(gram: Tensor, right: Tensor) -> Tensor:
    """Least squares; after Jacobi scaling one ridge fits strong and weak."""
    scale = gram.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(1e-30), torch.zeros_like(scale))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scaled = inverse[:, None] * gram * inverse + RIDGE[gram.dtype] * eye
    return inverse * torch.linalg.solve(scaled, inverse * right)


def usage(targets: Sequence[Target], factors: Factors) -> Tensor:
    """Return (L, K): power of each component in each layer's output, in units of the dense output's."""
    A, B, rows = factors.A, factors.B, []
    for target, row in zip(targets, factors.g, strict=True):
        power = float(((target.metric @ target.weight) * target.weight).sum())
        rows.append(row.square() * ((target.metric @ A) * A).sum(0) * B.square().sum(1) / max(power, 1e-300))
    return torch.stack(rows)


def packed(
    targets: Sequence[Target], factors: Factors, plan: BankPlan, found: list[float], private_losses: list[float]
) -> BankFit:
    """Arrange factors as primitives, selections and weights; `found` are their losses."""
    n, r, layers = plan.n_primitives, plan.rank, len(targets)
    selected = torch.stack([row.nonzero()[:, 0] for row in factors.active.reshape(layers, n, r).any(2)])
    weight = factors.g.reshape(layers, n, r).gather(1, selected[:, :, None].expand(-1, -1, r))
    if plan.composition == "scalar":
        weight = weight[:, :, :1]
    A = factors.A.reshape(-1, n, r).permute(1, 0, 2).contiguous()
    energy = usage(targets, factors).reshape(layers, n, r).sum(2)
    return BankFit(A, factors.B.reshape(n, r, -1), selected, weight, energy, found, private_losses)
