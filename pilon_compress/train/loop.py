"""The training loop: one for every task, on one process or many.

for each step:  rates for this share of the training -> micro batches -> clip -> optimisers
                -> now and then: metrics, validation, a checkpoint
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pilon_compress.config.training import TrainRecipe
from pilon_compress.data.batch import Batch
from pilon_compress.data.corpus import Streamed
from pilon_compress.errors import BadInput
from pilon_compress.io import signals
from pilon_compress.nn.sharded import full
from pilon_compress.parallel import World, last_micro_batch, reshard
from pilon_compress.train import schedule
from pilon_compress.train.callbacks import Callback
from pilon_compress.train.checkpoints import Checkpoints, tensors_of
from pilon_compress.train.monitor import Clock, Monitor, memory_gib, mfu
from pilon_compress.train.optim import learning

SMOOTHING = 0.98  # of the running mean that a spike is measured against
SETTLED = 50  # steps before a spike can be told from a beginning


class Stopped(BaseException):
    """A signal asked for an end; the state is saved. `code`: the exit code of the process."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Batches(Protocol):
    """Training data as the loop asks for it: see `order.Loader`."""

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> Batch: ...


@dataclass(frozen=True)
class Figure:
    """What a run is judged by: a function of the mean loss on the validation text, the better the lower that is."""

    name: str
    words: str
    of: Callable[[float], float]


PERPLEXITY = Figure("val_perplexity", "validation perplexity", lambda nats: math.exp(min(700.0, nats)))


@dataclass
class Training:
    """All that a run consists of.

    `trainee`: a module that maps (inputs, labels) to a loss summed over the scored tokens. `run`: the same, wrapped for
    several processes and compiled. `validate`: (loss, tokens) of this process's share of the validation text. `before`
    and `best`: means of that loss, over all processes, at the start (with `keep_best`) and the lowest so far. `told`:
    what the result says besides, from that loss at the end and at the start.
    """

    recipe: TrainRecipe
    world: World
    trainee: nn.Module
    run: Callable[..., Tensor]
    wrapped: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    batches: Batches
    steps: int
    validate: Callable[[], tuple[float, int]]
    checkpoints: Checkpoints
    prepare: Callable[[Batch], tuple[Any, ...]]
    callbacks: Sequence[Callback] = ()
    micro_batches: int = 1
    flops_per_token: float = 0.0
    keep_best: bool = False
    health: Callable[[], dict[str, float]] | None = None
    sample: Callable[[], str] | None = None
    half: bool = False
    figure: Figure = PERPLEXITY
    told: Callable[[float, float], dict[str, Any]] | None = None
    before: float = math.nan
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    kept: dict[str, Tensor] = field(default_factory=dict)


def train(job: Training, monitor: Monitor) -> None:
    """Train to the end, from where `job` stands. Raises Stopped on a signal, with the state saved, and BadInput where
    the loss runs away."""
    recipe, every = job.recipe, job.recipe.run.evaluate_every or max(1, job.steps // 20)
    clock, saved, mean = Clock(), time.monotonic(), math.nan
    if job.step == 0 and (job.keep_best or recipe.task == "heal"):
        job.before = _judge(job, monitor)
    with signals.watched() as asked:
        while job.step < job.steps:
            share = job.step / job.steps
            loss, norms = _step(job, share)
            job.step += 1
            clock.tokens += loss[1]
            logged = _logs(job, job.step)
            value = float(loss[0])
            mean = _check(value, mean, job)
            if logged:
                seconds, tokens = _flush(job, clock)
                figures = _figures(job, value, norms, seconds, tokens, share)
                if job.world.first:
                    monitor.log(job.step, figures)
                    monitor.show(job.step, figures)
            elif job.world.first:
                monitor.show(job.step, {})
            if job.step % every == 0 or job.step == job.steps:
                _flush(job, clock)
                _judge(job, monitor)
                clock.began = time.perf_counter()
            code = int(job.world.total(float(asked.code))[0]) if job.world.size > 1 else asked.code
            due = job.world.total(float(time.monotonic() - saved > recipe.run.checkpoint_every))[0] > 0
            if code or due or job.step == job.steps:
                _flush(job, clock)
                save(job)
                saved = time.monotonic()
                clock.began = time.perf_counter()
            if code and job.step < job.steps:
                raise Stopped(min(code, 143))


def _step(job: Training, share: float) -> tuple[tuple[float, int], dict[str, float]]:
    """One optimiser step: ((mean loss, tokens of all processes), gradient norms)."""
    recipe, world = job.recipe, job.world
    factor = schedule.rate(recipe.schedule, share + 1 / job.steps if share == 0 else share)
    for optimizer in job.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
    for callback in job.callbacks:
        callback.before(job.step, share)
    batches = [job.batches.batch(job.step, micro, world.rank, world.size) for micro in range(job.micro_batches)]
    counts = world.total(sum(batch.scored for batch in batches), sum(batch.tokens for batch in batches))
    scored, tokens = max(1, round(counts[0])), round(counts[1])
    total = 0.0
    for micro, batch in enumerate(batches):
        arguments = job.prepare(batch.to(world.device))
        last = micro == job.micro_batches - 1
        with last_micro_batch(job.wrapped, last):
            with torch.autocast(world.device.type, torch.bfloat16) if job.half else nullcontext():
                loss = job.run(*arguments) / scored
            extra = [p for p in (callback.penalty() for callback in job.callbacks) if p is not None] if last else []
            # processes average their gradients: times their number, so that it is the mean over all tokens
            (loss * world.size + sum(extra)).backward()
        total += float(loss.detach())
    norms = _clip(job)
    with ExitStack() as stack:
        for callback in job.callbacks:
            stack.enter_context(callback.around())
        for optimizer in job.optimizers:
            optimizer.step()
    for optimizer in job.optimizers:
        optimizer.zero_grad(set_to_none=True)
    return (world.total(total)[0], tokens), norms


def _logs(job: Training, step: int) -> bool:
    """Whether the figures of a step, counted from 1, are written down."""
    return step % job.recipe.run.log_every == 0 or step in (1, job.steps)


def _clip(job: Training) -> dict[str, float]:
    """Clip the gradients of all that learns; their norm, and where it will be written down that of each group."""
    groups, limit = learning(job.optimizers), job.recipe.optimizer.clip
    norms = {}
    if _logs(job, job.step + 1):
        gradients = {name: [p.grad for p in group if p.grad is not None] for name, group in groups.items()}
        norms = {f"gradient_norm_{name}": float(full(get_total_norm(found))) for name, found in gradients.items()}
    norms["gradient_norm"] = 0.0
    if limit is not None:
        norms["gradient_norm"] = float(full(clip_grad_norm_([p for group in groups.values() for p in group], limit)))
    return norms


def _check(loss: float, mean: float, job: Training) -> float:
    """The running mean with this loss. Raises BadInput for a loss that is not finite or far above it."""
    limit, what = job.recipe.run.spike, ""
    if not math.isfinite(loss):
        what = f"the loss is {loss} at step {job.step}: lower optimizer.learning_rate"
    elif limit is not None and job.step > SETTLED and loss > mean + limit:
        what = f"the loss jumped from {mean:.3g} to {loss:.3g} at step {job.step}: lower optimizer.learning_rate, "
        what += "or raise run.spike"
    if what:
        raise BadInput(f"{what}; {job.checkpoints.standing()}")
    return loss if math.isnan(mean) else SMOOTHING * mean + (1 - SMOOTHING) * loss


def _figures(
    job: Training, loss: float, norms: dict[str, float], seconds: float, tokens: int, share: float
) -> dict[str, Any]:
    speed = tokens / max(seconds, 1e-9)
    figures: dict[str, Any] = {
        "loss": loss,
        "tokens": job.tokens,
        "tokens_per_second": speed,
        "seconds": job.seconds,
        "rate": schedule.rate(job.recipe.schedule, share),
        "memory_gib": memory_gib(job.world.device),
        **norms,
    }
    used = mfu(speed * job.flops_per_token / job.world.size, job.world.device)
    return figures | ({"mfu": used} if used is not None else {})


def _flush(job: Training, clock: Clock) -> tuple[float, int]:
    """Add what the clock has counted to the run's totals: (seconds, tokens)."""
    seconds, tokens = clock.look()
    job.tokens, job.seconds = job.tokens + tokens, job.seconds + seconds
    return seconds, tokens


def _judge(job: Training, monitor: Monitor) -> float:
    """The mean loss on the fixed slice; remembers the weights if they are the best and that matters."""
    loss = validation_loss(job)
    value = job.figure.of(loss)
    if job.keep_best and (loss < job.best or not job.kept):
        job.kept = _weights(job)
    job.best = min(job.best, loss)
    figures: dict[str, Any] = {job.figure.name: value, "tokens": job.tokens}
    if job.health is not None:
        figures |= job.health()
    if job.sample is not None:
        figures["sample"] = job.sample()
    if job.world.first:
        monitor.log(job.step, figures)
        monitor.say(f"step {job.step}/{job.steps}  {job.figure.words} {value:.4g}")
        if "sample" in figures:
            monitor.say(f"  {' '.join(figures['sample'].split())}")
    return loss


def validation_loss(job: Training) -> float:
    """The mean loss over the validation text, of all processes."""
    training = job.trainee.training
    job.wrapped.eval()
    with torch.no_grad(), torch.autocast(job.world.device.type, torch.bfloat16) if job.half else nullcontext():
        loss, tokens = job.world.total(*map(float, job.validate()))
    reshard(job.wrapped)
    job.wrapped.train(training)
    return loss / max(1.0, tokens)


@torch.no_grad()
def put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into the parameters of those names."""
    for name, parameter in module.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])


def _weights(job: Training) -> dict[str, Tensor]:
    """Copies of what learns, by name."""
    return {name: p.detach().clone() for name, p in job.trainee.named_parameters() if p.requires_grad}


def _tensors(job: Training) -> dict[str, Tensor]:
    return tensors_of(job.trainee, job.optimizers) | {f"best.{name}": tensor for name, tensor in job.kept.items()}


def save(job: Training) -> None:
    """A checkpoint of everything."""
    plain: dict[str, Any] = {
        "tokens": job.tokens,
        "seconds": job.seconds,
        "best": job.best if math.isfinite(job.best) else None,
        "before": job.before if math.isfinite(job.before) else None,
    }
    plain["recipe"] = job.recipe.model_dump(mode="json")
    job.checkpoints.save(job.step, _tensors(job), plain, job.batches if isinstance(job.batches, Streamed) else None)


def restore(job: Training, step: int) -> None:
    """Continue from the checkpoint of `step`."""
    plain = job.checkpoints.plain(step)
    if job.keep_best:
        job.kept = _weights(job)
    job.checkpoints.load(step, _tensors(job))
    job.step, job.tokens, job.seconds = step, plain["tokens"], plain["seconds"]
    job.best = math.inf if plain["best"] is None else plain["best"]
    job.before = math.nan if plain.get("before") is None else plain["before"]
    if isinstance(job.batches, Streamed):
        job.batches.load(job.checkpoints.stream(step))
