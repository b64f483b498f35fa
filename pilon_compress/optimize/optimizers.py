"""Build the optimisers: parameter groups with their rates, AdamW, and Muon for matrices and primitives.

banks           primitives: (n, d_in, r) and (n, r, d_out)
compositions    weights of compositions, and what research adds to banks and projections
routers         those that choose experts: no weight decay, which would pull all experts together
embeddings      token and position embeddings, untied heads
matrices        every other parameter of two dimensions
vectors         norms and biases: no weight decay
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.config.training_sections import Optimizer
from pilon_compress.nn.installed import banks, dense_matrices, neuron_banks, neuron_projections, projections, routers
from pilon_compress.nn.part import Part
from pilon_compress.nn.sharded import full

GROUPS = ("banks", "compositions", "routers", "embeddings", "matrices", "vectors")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients and steps of Jordan et al., 2024
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95
LEAST_RMS = 1e-3  # root mean square that a tensor near zero is taken to have


def group_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return every trainable parameter once, by group and name."""
    groups: dict[str, dict[str, nn.Parameter]] = {group: {} for group in GROUPS}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{leaf}" if prefix else leaf
            groups[_group(module, leaf, parameter, name)][name] = parameter
    return groups


def _group(module: nn.Module, leaf: str, parameter: Tensor, name: str) -> str:
    own = module.optimizer_group(leaf) if isinstance(module, Part) else None
    if own is not None:
        return own
    if isinstance(module, nn.Embedding) or name.endswith("lm_head.weight"):
        return "embeddings"
    return "matrices" if parameter.dim() == 2 else "vectors"


def restrict(model: PreTrainedModel, train: str) -> None:
    """Let only some parameters learn: `all`, those of replaced projections (`ffn`), or `compositions` and routers."""
    if train == "all":
        return
    model.requires_grad_(False)
    learning: list[nn.Module] = [layer for _, layer in projections(model)]
    learning += [layer for _, layer in neuron_projections(model)]
    learning += [router for _, router in routers(model)]
    if train == "ffn":
        learning += [part for _, part in (*banks(model), *dense_matrices(model), *neuron_banks(model))]
    for module in learning:
        for parameter in module.parameters():  # their additions included
            parameter.requires_grad_(True)


def make_optimizers(model: nn.Module, asked: Optimizer) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for matrices and banks with AdamW beside it.

    Each group of each optimiser holds `name` (see GROUPS) and `base_lr`, its learning rate at the top of the schedule.
    With `relative`, AdamW has a group for each tensor, whose rate is a share of the tensor's root mean square: those of
    a converted model differ by orders of magnitude.
    """
    groups = group_parameters(model)
    factors = {name: getattr(asked, name) for name in ("banks", "compositions", "routers", "embeddings")}
    by_muon = ("banks", "matrices") if asked.name == "muon" else ()

    def entries(names: Iterable[str], rate: float) -> list[dict[str, Any]]:
        decayed = ("banks", "matrices", "embeddings")
        return [
            {
                "params": list(groups[name].values()),
                "name": name,
                "lr": rate * factors.get(name, 1.0),
                "base_lr": rate * factors.get(name, 1.0),
                "weight_decay": asked.weight_decay if name in decayed else 0.0,
            }
            for name in names
            if groups[name]
        ]

    made: list[torch.optim.Optimizer] = []
    plain = entries([name for name in GROUPS if name not in by_muon], asked.learning_rate)
    if asked.relative:
        plain = [one for group in plain for one in _one_each(group)]
    if plain:
        made.append(torch.optim.AdamW(plain, betas=asked.betas, eps=1e-12 if asked.relative else 1e-8, fused=True))
    if orthogonal := entries(by_muon, asked.muon_learning_rate):
        made.append(Muon(orthogonal))
    return made


def _one_each(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of many tensors as groups of one, with rates relative to their size."""
    sizes = [max(LEAST_RMS, float(full(p.detach().square().mean()).sqrt())) for p in group["params"]]
    return [
        {**group, "params": [p], "lr": group["lr"] * size, "base_lr": group["base_lr"] * size}
        for p, size in zip(group["params"], sizes, strict=True)
    ]


def learning(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, list[Tensor]]:
    """By group, the parameters that have a gradient and a learning rate: frozen ones must not scale the others down."""
    found: dict[str, list[Tensor]] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        moving = [p for p in group["params"] if p.grad is not None] if group["lr"] else []
        found.setdefault(group["name"], []).extend(moving)
    return {name: parameters for name, parameters in found.items() if parameters}


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: for matrices (m, n), and for banks (n, d, r) primitive by primitive.

    Jordan et al. (2024), as `torch.optim.Muon`, which takes matrices only; updates are scaled by
    0.2 · sqrt(max(m, n)), so that they are as large as AdamW's (Moonlight, Liu et al., 2025).
    """

    def __init__(self, params: Sequence[dict[str, Any]], lr: float = 5e-3) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": MOMENTUM})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(state["momentum"], group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * max(parameter.shape[-2:]) ** 0.5 * group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """U Vᵀ of every matrix (..., m, n) = U S Vᵀ, roughly: singular values end between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    X = matrix.mT if tall else matrix
    X = X.to(torch.bfloat16) if X.is_cuda else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = X @ X.mT
        X = a * X + (b * square + c * square @ square) @ X
    return (X.mT if tall else X).to(matrix.dtype)
