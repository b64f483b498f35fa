"""The optimisation loop: one for every training task and for `convert --refine`, on one process or many.

for each step:  rates for this share of the training -> micro batches -> clip -> optimisers
                -> now and then: metrics, validation, a checkpoint

A loss that is not finite or jumps ends the run, unless it keeps the best weights: then it goes on from these, with
fresh optimiser states and half the learning rate, RESTARTS times at most.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from pilon_compress.errors import BadInput
from pilon_compress.io import signals
from pilon_compress.nn.sharded import full
from pilon_compress.optimize.monitor import Clock, memory_gib, mfu
from pilon_compress.optimize.optimizers import learning
from pilon_compress.optimize.training import Training, put, save, weights
from pilon_compress.parallel import last_micro_batch, reshard

SMOOTHING = 0.98  # of the running mean that a spike is measured against
SETTLED = 50  # steps before a spike can be told from a beginning
LOOKS = 20  # evaluations of a run that does not say how many
RESTARTS = 3


class Stopped(BaseException):
    """A signal asked for an end; the state is saved. `code`: the exit code of the process."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Diverged(BadInput):
    """The loss ran away, and restarts from the best weights did not help."""


class Monitor(Protocol):
    """Receives the figures of a run: see `monitor.Monitor`."""

    def log(self, step: int, figures: dict[str, Any]) -> None:
        """Record the figures of a step."""

    def show(self, step: int, figures: dict[str, Any]) -> None:
        """Show the figures of a step while the run goes on."""

    def say(self, message: str) -> None:
        """Print a line."""


def train(job: Training, monitor: Monitor) -> None:
    """Train to the end, from where `job` stands.

    Raises Stopped on a signal, with the state saved, and Diverged where the loss runs away for good. The best weights
    are in `job.best_weights`, not yet in the trainee.
    """
    clock, saved, job.began = Clock(), time.monotonic(), time.perf_counter()
    if job.step == 0 and job.evaluate_first:
        job.before = _evaluate(job, monitor)
    with _signals(job) as asked:
        ended = job.share >= 1
        while not ended:
            share = job.share
            loss, tokens, norms = _step(job, share)
            job.step += 1
            clock.tokens += tokens
            reason = _ran_away(job, loss)
            if reason is None:
                job.mean = loss if math.isnan(job.mean) else SMOOTHING * job.mean + (1 - SMOOTHING) * loss
                _tell(job, monitor, clock, (loss, norms, share))
            else:
                _restart(job, reason, monitor)
            ended = job.share >= 1
            if ended or _evaluates(job, share):
                _flush(job, clock)
                if not _is_sound(job, _evaluate(job, monitor)):
                    _restart(job, f"the validation loss ran away by step {job.step}", monitor)
                clock.began = time.perf_counter()
            code = round(job.world.total(float(asked.code))[0])
            due = job.world.total(float(time.monotonic() - saved > job.how.checkpoint_every))[0] > 0
            if code or due or ended:
                _flush(job, clock)
                save(job)
                saved = time.monotonic()
                clock.began = time.perf_counter()
            if code and not ended:
                raise Stopped(min(code, 143))


@contextmanager
def _signals(job: Training) -> Iterator[signals.EndRequest]:
    """Note signals where a checkpoint can be saved before they end the process; else they end it as ever."""
    if job.checkpoints is None:
        yield signals.EndRequest()
        return
    with signals.watched() as asked:
        yield asked


def _step(job: Training, share: float) -> tuple[float, int, dict[str, float]]:
    """Run one optimiser step; return mean loss, tokens of all processes, and gradient norms."""
    world, factor = job.world, job.factor(share)
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
            means = [p for p in (callback.batch_penalty() for callback in job.callbacks) if p is not None]
            extra += [mean * (batch.tokens * world.size / max(1, tokens)) for mean in means]
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
    return world.total(total)[0], tokens, norms


def _logs(job: Training, step: int) -> bool:
    """True if the figures of a step, counted from 1, are written down."""
    return step % job.how.log_every == 0 or step in (1, job.steps)


def _evaluates(job: Training, before: float) -> bool:
    """True if the step that has just been taken, at share `before`, is followed by a look at the validation text."""
    every = job.how.evaluate_every or max(1, job.steps // LOOKS)
    if job.limit is None:
        return job.step % every == 0
    looks = job.steps / every
    return int(job.share * looks) > int(before * looks)


def _clip(job: Training) -> dict[str, float]:
    """Clip the gradients of all that learns; their norm, and where it will be written down that of each group."""
    groups = learning(job.optimizers)
    norms = {}
    if _logs(job, job.step + 1):
        gradients = {name: [p.grad for p in group if p.grad is not None] for name, group in groups.items()}
        norms = {f"gradient_norm_{name}": float(full(get_total_norm(found))) for name, found in gradients.items()}
    norms["gradient_norm"] = 0.0
    if job.clip is not None:
        every = [p for group in groups.values() for p in group]
        norms["gradient_norm"] = float(full(clip_grad_norm_(every, job.clip)))
    return norms


def _ran_away(job: Training, loss: float) -> str | None:
    """Return why the run cannot continue, or None."""
    spike = job.how.spike
    if not math.isfinite(loss):
        return f"the loss is {loss} at step {job.step}: lower optimizer.learning_rate"
    if spike is not None and job.step > SETTLED and loss > job.mean + spike:
        what = f"the loss jumped from {job.mean:.3g} to {loss:.3g} at step {job.step}"
        return f"{what}: lower optimizer.learning_rate, or raise run.spike"
    return None


def _is_sound(job: Training, loss: float) -> bool:
    """False for a validation loss from which a run that keeps its best weights goes back to them."""
    return not job.keep_best or (math.isfinite(loss) and not loss > job.worst * job.before)


def _restart(job: Training, reason: str, monitor: Monitor) -> None:
    """Go back to the best weights, at half the rate. Raises Diverged where none are kept, or after RESTARTS."""
    if not job.best_weights or job.halvings == RESTARTS:
        again = f", after {RESTARTS} restarts from the best weights" if job.best_weights else ""
        standing = f"; {job.checkpoints.standing()}" if job.checkpoints is not None else ""
        raise Diverged(f"{reason}{again}{standing}")
    put(job.trainee, job.best_weights)
    for optimizer in job.optimizers:
        optimizer.state.clear()
    job.halvings, job.restarted, job.mean = job.halvings + 1, job.share, math.nan
    if job.world.first:
        monitor.say(f"step {job.step}/{job.steps}  {reason}; on from the best weights at half the rate")


def _tell(job: Training, monitor: Monitor, clock: Clock, step: tuple[float, dict[str, float], float]) -> None:
    """Write down the figures of a `step`, (loss, norms, share), if it is its turn; move the bar in any case."""
    if not _logs(job, job.step):
        figures: dict[str, Any] = {}
    else:
        seconds, tokens = _flush(job, clock)
        figures = _figures(job, *step, seconds, tokens)
        if job.world.first:
            monitor.log(job.step, figures)
    if job.world.first:
        monitor.show(job.step, figures)


def _figures(
    job: Training, loss: float, norms: dict[str, float], share: float, seconds: float, tokens: int
) -> dict[str, Any]:
    speed = tokens / max(seconds, 1e-9)
    figures: dict[str, Any] = {
        "loss": loss,
        "tokens": job.tokens,
        "tokens_per_second": speed,
        "seconds": job.seconds,
        "rate": job.factor(share),
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


def _evaluate(job: Training, monitor: Monitor) -> float:
    """The mean loss on the validation text; remembers the weights if they are the best and that matters."""
    loss = validation_loss(job)
    value = job.metric.of(loss)
    if job.keep_best and (loss < job.best or not job.best_weights):
        job.best_weights = weights(job.trainee)
    job.best = min(job.best, loss)
    figures: dict[str, Any] = {job.metric.name: value, "tokens": job.tokens}
    if job.diagnostics is not None:
        figures |= job.diagnostics()
    if job.sample is not None:
        figures["sample"] = job.sample()
    if job.world.first:
        monitor.log(job.step, figures)
        monitor.say(f"step {job.step}/{job.steps}  {job.metric.words} {value:.4g}")
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
