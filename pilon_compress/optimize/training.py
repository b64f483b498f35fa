"""A run of the optimisation loop: its parts and its state, kept in checkpoints where there are any."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pilon_compress.config.training_sections import Run
from pilon_compress.data.batch import Batch
from pilon_compress.data.corpus import Streamed
from pilon_compress.nn.router import Router
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.optimize.checkpoints import Checkpoints, tensors_of
from pilon_compress.parallel import World


class Batches(Protocol):
    """Training data as the loop asks for it: see `data.loader.Loader`."""

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> Batch:
        """Return the micro batch `micro` of a step, the part of process `rank` of `world`."""


@dataclass(frozen=True)
class ValidationMetric:
    """The figure that a run is judged by: a function of the mean loss on the validation text, which falls with it."""

    name: str
    words: str
    of: Callable[[float], float]


PERPLEXITY = ValidationMetric("val_perplexity", "validation perplexity", lambda nats: math.exp(min(700.0, nats)))


@dataclass
class Training:
    """The parts of a run.

    trainee      a module that maps what `prepare` makes of a batch to a loss, summed over what the batch scores
    run          the same, wrapped for several processes and compiled
    validate     (summed loss, tokens or texts) of this process's share of the validation text
    how          how often figures are written, validation is run, checkpoints are saved
    rate         factor on the learning rates after a share (0 to 1) of the training
    clip         largest norm of the gradient
    recipe       kept in checkpoints
    limit        seconds after which the run ends, of one process; the schedule then follows the clock if that is faster
    keep_best    keep the weights that were best on the validation text, and go on from them where the loss runs away
    worst        validation loss over the first one from which on the loss counts as run away
    routing      figures of the routers since the last look, see `train.routing`; None of a model without experts
    extra_fields further fields of the result, from the mean validation loss at the end and at the start

    State: `before` and `best`, means of the validation loss over all processes at the start (with `evaluate_first`) and
    the lowest so far; `best_weights`; `mean`, the running mean of the training loss; `halvings` of the learning
    rate, and the share of the training at which the last one `restarted` the schedule.
    """

    world: World
    trainee: nn.Module
    run: Callable[..., Tensor]
    wrapped: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    batches: Batches
    steps: int
    validate: Callable[[], tuple[float, int]]
    prepare: Callable[[Batch], tuple[Any, ...]]
    how: Run
    rate: Callable[[float], float]
    clip: float | None = None
    checkpoints: Checkpoints | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()
    micro_batches: int = 1
    flops_per_token: float = 0.0
    limit: float | None = None
    evaluate_first: bool = False
    keep_best: bool = False
    worst: float = math.inf
    diagnostics: Callable[[], dict[str, float]] | None = None
    routing: Callable[[], Any] | None = None
    sample: Callable[[], str] | None = None
    half: bool = False
    metric: ValidationMetric = PERPLEXITY
    extra_fields: Callable[[float, float], dict[str, Any]] | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    mean: float = math.nan
    before: float = math.nan
    best: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    halvings: int = 0
    restarted: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def share(self) -> float:
        """Share of the training that is done, 0 to 1: of the steps or, if that is more, of the time limit."""
        done = self.step / self.steps
        if self.limit is None:
            return done
        return min(1.0, max(done, (time.perf_counter() - self.began) / max(self.limit, 1e-9)))

    def factor(self, share: float) -> float:
        """Factor on the learning rates at `share`: of the schedule, begun anew and halved by every restart."""
        done = (share - self.restarted) / (1 - self.restarted)
        return self.rate(done or 1 / self.steps) * 0.5**self.halvings


@torch.no_grad()
def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters, and the routers' balances, of those names."""
    for name, parameter in (*module.named_parameters(), *_balances(module)):
        if name in tensors:
            parameter.copy_(tensors[name])


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that learn, and of what moves beside them, by name."""
    learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return {name: p.detach().clone() for name, p in (*learning, *_balances(module))}


def _balances(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the balances of routers by name: buffers that a training moves."""
    return [(f"{name}.balance", part.balance) for name, part in module.named_modules() if isinstance(part, Router)]


def _tensors(job: Training) -> dict[str, Tensor]:
    found = tensors_of(job.trainee, job.optimizers)
    return found | {f"best.{name}": tensor for name, tensor in job.best_weights.items()}


def save(job: Training) -> None:
    """Write a checkpoint of everything, of a run that keeps any."""
    if job.checkpoints is None:
        return
    plain = {
        "tokens": job.tokens,
        "seconds": job.seconds,
        "mean": job.mean if math.isfinite(job.mean) else None,
        "best": job.best if math.isfinite(job.best) else None,
        "before": job.before if math.isfinite(job.before) else None,
        "halvings": job.halvings,
        "restarted": job.restarted,
        "recipe": job.recipe,
    }
    job.checkpoints.save(job.step, _tensors(job), plain, job.batches if isinstance(job.batches, Streamed) else None)


def restore(job: Training, step: int) -> None:
    """Go on from the checkpoint of `step`."""
    assert job.checkpoints is not None
    plain = job.checkpoints.plain(step)
    if job.keep_best:
        job.best_weights = weights(job.trainee)
    job.checkpoints.load(step, _tensors(job))
    job.step, job.tokens, job.seconds = step, plain["tokens"], plain["seconds"]
    job.halvings, job.restarted = plain["halvings"], plain["restarted"]
    job.mean = math.nan if plain["mean"] is None else plain["mean"]
    job.best = math.inf if plain["best"] is None else plain["best"]
    job.before = math.nan if plain["before"] is None else plain["before"]
    if isinstance(job.batches, Streamed):
        job.batches.load(job.checkpoints.stream(step))
