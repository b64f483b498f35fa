"""The joint fit: one bank for the layers of a band, each layer judged by its own two-sided metric.

    minimise  Σ_l  tr((W_l - A diag(g_l) B)ᵀ C_l (W_l - A diag(g_l) B) G_l)
    A (d_in, K)   B (K, d_out)   g (L, K), zero outside the primitives that layer l selects;   K = n·r

It starts from the layers' own best factors side by side (g one-hot, the budget-matched private solution), a saddle
that a little noise on g leaves quickly. L-BFGS over A and B, with g the best for them, goes on from there. Which
primitives a layer may use is settled at the start; a layer that may use no more than its own is best as it is, by
Eckart and Young. In the end the private start is returned instead if the fit is not better.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.sharing.grouping import group
from pilon_compress.convert.sharing.lbfgs import minimise
from pilon_compress.convert.sharing.objective import Band, Point
from pilon_compress.convert.solve.low_rank import Target

NOISE = 0.3  # on g at the start; without it the first ten sweeps gain next to nothing (docs/log.md)
EVALUATIONS = 4  # of loss and gradient per sweep: a little more than an alternation over A, B and g costs


@dataclass
class BankFit:
    """A fitted bank and each layer's composition, in float64 until `layers` rounds it.

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


def fit_bank(
    targets: list[Target],
    plan: BankPlan,
    seed: int = 0,
    sweeps: int = 24,
    tolerance: float = 2e-3,
    method: str = "pilon",
) -> BankFit:
    """Fit one bank to the `targets` of a band. Deterministic for a seed; never worse than the private start.

    `sweeps` bounds its length, one being EVALUATIONS of the band's loss; it ends early once two of them lower the loss
    by less than `tolerance` of it. `method`: whose factors a bank of one layer gets.
    """
    if len(targets) == plan.n_primitives == 1 and method == "pilon":
        return _alone(targets[0], plan)
    band = Band(targets, plan.rank, plan.composition == "scalar")
    start, private_losses = private_start(band, plan, method)
    best, best_losses = start, band.losses(start.A, start.B, start.g)
    shares = bool((start.active.sum(0) > 1).any())
    if shares and band.scale * sum(private_losses) > 1e-12:
        fitted = _joint(band, start, plan, seed, sweeps, tolerance)
        losses = band.losses(fitted.A, fitted.B, fitted.g)
        if sum(losses) < sum(best_losses):
            best, best_losses = fitted, losses
    return _pack(best, plan, _usage(band, best), best_losses, private_losses)


def _alone(target: Target, plan: BankPlan) -> BankFit:
    """One primitive for one layer: the target's best factors as they are, and the loss that its eigenvalues tell."""
    A, B = target.components("pilon", plan.rank)
    short = plan.rank - A.shape[1]  # more components than the matrix has directions
    A, B = torch.nn.functional.pad(A, (0, short)), torch.nn.functional.pad(B, (0, 0, 0, short))
    power = (((target.metric @ A) * A).sum(0) * B.square().sum(1)).sum() / max(target.power, 1e-300)
    losses = [float(target.two_sided[2][plan.rank :].sum())]
    weight = A.new_ones(1, 1, 1 if plan.composition == "scalar" else plan.rank)
    selected = torch.zeros(1, 1, dtype=torch.long, device=A.device)
    return BankFit(A[None], B[None], selected, weight, power.reshape(1, 1), losses, losses)


def recompose(fit: BankFit, place: int, target: Target, plan: BankPlan) -> None:
    """Fit, in place, the composition of the `place`-th layer to another `target`; the bank stays."""
    band = Band([target], plan.rank, plan.composition == "scalar")
    n, d_in, r = fit.A.shape
    active = torch.zeros(1, n, dtype=torch.bool, device=fit.A.device)
    active[0, fit.selected[place]] = True
    g = band.compose(fit.A.permute(1, 0, 2).reshape(d_in, n * r), fit.B.reshape(n * r, -1), active)
    weight = g.reshape(n, r)[fit.selected[place]]
    fit.weight[place] = weight[:, :1] if plan.composition == "scalar" else weight


def private_start(band: Band, plan: BankPlan, method: str = "pilon") -> tuple[State, list[float]]:
    """The layers' whitened SVDs side by side, each layer composing its own primitives; and their losses.

    Spare top-k slots take primitives of the layers after, in a ring, the weakest first: those have least to lose by
    becoming something else, and serve two layers best (docs/log.md). Least squares may use or leave them.
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
        others = [own[(index + step) % layers].nonzero()[:, 0].flip(0) for step in range(1, layers)]
        active[index, torch.cat([own[index].nonzero()[:, 0], *others])[: plan.top_k]] = True
    g = band.compose(A, B, active)
    composed = band.losses(A, B, g)
    for index in range(layers):  # rounding in least squares must not spoil an exact private solution
        if composed[index] > private_losses[index] and bool((own[index] <= active[index]).all()):
            g[index] = onehot[index]
    return State(A, B, g, active), private_losses


def _joint(band: Band, start: State, plan: BankPlan, seed: int, sweeps: int, tolerance: float) -> State:
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE * torch.randn(start.g.shape, generator=generator).to(start.g.device)
    if band.scalar:
        noise = noise[:, :: plan.rank].repeat_interleave(plan.rank, dim=1)
    A, B = band.whitened(start.A, start.B)
    g = band.compose(A, B, start.active)
    A, B = band.alternate(A, B, g + noise.float() * start.active.repeat_interleave(plan.rank, dim=1))
    x = minimise(lambda x: Point(band, x, start.active), torch.cat([A, B.T]), EVALUATIONS * max(1, sweeps), tolerance)
    A, B = band.original(x[: len(A)], x[len(A) :].T)
    state = State(A, B, band.compose(A, B, start.active), start.active)
    if plan.top_k < plan.n_primitives or band.scalar:
        return state
    order = group(_usage(band, state), plan.rank, seed)  # all are active, so they may be primitives in any way
    return State(A[:, order], B[order], state.g[:, order], start.active)


def _usage(band: Band, state: State) -> Tensor:
    """(L, K): power of each component in each layer's output, in units of the dense output's."""
    A, B, rows = state.A, state.B, []
    for target, row in zip(band.targets, state.g, strict=True):
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
