"""Routers in training: the losses that spread tokens over experts, and figures of how they are spread.

router_entropy      how evenly a router's scores spread over the experts: 0 (one has all) to 1; mean over tokens, blocks
load_cv             standard deviation of the experts' load over its mean: 0 (even); mean over blocks
load_max            load of the busiest expert over the mean; the largest of all blocks
expert_similarity   mean cosine of two experts of a block: 1 (all alike), see `expert_similarity`
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pilon_compress.config.experts import ExpertsConfig
from pilon_compress.nn.installed import neuron_projections, projections, routers
from pilon_compress.nn.router import Load, Router
from pilon_compress.nn.sharded import full
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.parallel import World
from pilon_compress.results.routing import Routing


class RouterLosses(Callback):
    """The load-balancing loss, the z-loss, and the balance of the choice, of every router of a model."""

    def __init__(self, model: Any, asked: ExpertsConfig, world: World) -> None:
        self.routers = [router for _, router in routers(model)]
        self.asked, self.world = asked, world
        self.loads = [_watch(router) for router in self.routers] if asked.bias_rate else []

    def batch_penalty(self) -> Tensor | None:
        """Return the weighted losses, the mean over the routers that ran."""
        terms = [pair for pair in (router.take_terms() for router in self.routers) if pair is not None]
        if not terms or not (self.asked.balance or self.asked.z_loss):
            return None
        balance, z_loss = (torch.stack(one).mean() for one in zip(*terms, strict=True))
        return self.asked.balance * balance + self.asked.z_loss * z_loss

    def before(self, step: int, share: float) -> None:
        """Begin to count the step's load."""
        for load in self.loads:
            load.clear()

    @contextmanager
    def around(self) -> Iterator[None]:
        """Move the balance towards experts of less load than the mean, after the step."""
        yield
        for router, load in zip(self.routers, self.loads, strict=False):
            counts = torch.tensor(self.world.total(*load.counts.tolist()))
            router.balance += self.asked.bias_rate * (counts.mean() - counts).sign().to(router.balance)
        for router in self.routers:
            router.terms = None  # of the passes that checkpointing repeated


def _watch(router: Router) -> Load:
    load = Load(torch.zeros(router.experts, dtype=torch.float64))
    router.watchers.append(load)
    return load


class RoutingFigures:
    """Counts what the routers of a model do from one look to the next; a call looks, and begins again."""

    def __init__(self, model: Any, world: World) -> None:
        self.model, self.world = model, world
        self.loads = {name: _watch(router) for name, router in routers(model)}

    def __call__(self) -> dict[str, float]:
        """Return the figures of the training page: see above; {} of a model without experts."""
        found = self.report()
        if found is None:
            return {}
        return {
            "router_entropy": found.entropy,
            "load_cv": found.load_cv,
            "load_max": found.load_max,
            "expert_similarity": found.similarity,
        }

    def report(self) -> Routing | None:
        """Return the figures with every block's load, of all processes; None without experts, or before any token."""
        loads: dict[str, list[float]] = {}
        entropies: list[float] = []
        for name, load in self.loads.items():
            *counts, entropy, tokens = self.world.total(*load.counts.tolist(), float(load.entropy), load.tokens)
            load.clear()
            if tokens:
                loads[name] = [count / sum(counts) for count in counts]
                entropies.append(entropy / tokens / torch.tensor(float(len(counts))).log().item())
        if not loads:
            return None
        shares = [torch.tensor(load, dtype=torch.float64) for load in loads.values()]
        return Routing(
            entropy=sum(entropies) / len(entropies),
            load_cv=sum(float(one.std(correction=0) / one.mean()) for one in shares) / len(shares),
            load_max=max(float(one.max() / one.mean()) for one in shares),
            similarity=expert_similarity(self.model),
            load=loads,
        )


@torch.no_grad()
def expert_similarity(model: Any) -> float:
    """Return the mean cosine of two experts of a block, over pairs, projections and blocks.

    An expert is the vector of its coefficients over the whole bank, each times the size of its component; of neurons
    that of its scales.
    """
    recipes: list[Tensor] = []
    for _, layer in projections(model):
        if layer.experts > 1:
            weight = full(layer.weight).float()
            sizes = layer.bank.sizes().float()
            spread = weight.new_zeros(layer.experts, *sizes.shape)
            places = layer.selected.expand(layer.experts, -1)[..., None].expand(-1, -1, sizes.shape[1])
            recipes.append((spread.scatter(1, places, weight.expand(places.shape)) * sizes).flatten(1))
    for _, one in neuron_projections(model):
        if one.experts > 1 and one.role == "down":
            whole = torch.ones(one.experts, one.top_k, device=one.weight.device)
            scale = full(one.weight).float() if one.scaled else whole
            if one.selection is not None:
                places = one.selection.selected.expand(one.experts, -1)
                scale = scale.new_zeros(one.experts, one.bank.neurons).scatter(1, places, scale)
            recipes.append(scale)
    found = [_mean_cosine(rows) for rows in recipes]
    return sum(found) / len(found) if found else 1.0


def _mean_cosine(rows: Tensor) -> float:
    pairs: Sequence[tuple[int, int]] = list(combinations(range(len(rows)), 2))
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    return float(cosine_similarity(rows[first], rows[second]).mean())
