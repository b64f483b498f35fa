"""Adam with the best state on held-out text kept: it never ends worse, and halves its rate where a loss diverges."""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.io.progress import track

CHECKS = 12  # looks at the held-out text per descent
WARM_UP = 0.05
HALVINGS = 3
DIVERGED = 4.0  # times the loss at the start
FLOOR = 1e-3  # root mean square that a tensor near zero is taken to have


@dataclass
class Stage:
    """One descent, for the report. Losses are of the held-out text; `history` lists (step, loss)."""

    name: str
    steps: int
    seconds: float
    rate: float
    before: float
    after: float
    kept: bool
    halvings: int
    history: list[tuple[int, float]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Objective:
    """What is descended. `train(b)` adds the gradient of batch b's loss to the parameters and returns the loss;
    `held_out()` is the loss of the held-out text, without gradient."""

    batches: int
    train: Callable[[int], float]
    held_out: Callable[[], float]


class Budget:
    """Steps, and seconds where a time limit is given: `spent` runs from 0 to 1 by whichever is nearer its end."""

    def __init__(self, steps: int, seconds: float | None) -> None:
        self.steps, self.seconds, self.done, self.started = steps, seconds, 0, time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def spent(self) -> float:
        by_time = self.elapsed() / max(self.seconds, 1e-9) if self.seconds is not None else 0.0
        return min(1.0, max(self.done / max(1, self.steps), by_time))


def descend(
    name: str,
    parameters: Sequence[nn.Parameter],
    objective: Objective,
    *,
    steps: int,
    seconds: float | None = None,
    seed: int = 0,
    rate: float,
) -> Stage:
    """Minimise `objective` by Adam from where `parameters` are; they end at the best state seen on the held-out text.

    `rate` is relative: an Adam step moves a number by this share of its tensor's root mean square, so that it means the
    same for every model. Warm-up, then cosine decay. If a loss is not finite or the
    held-out loss grows DIVERGED-fold, the best state is restored and the rate halved, HALVINGS times at most. With
    `seconds`, the schedule follows the clock and results differ from run to run; with `steps` alone they do not.
    """
    run = _Descent(parameters, objective, seed)
    budget = Budget(steps, seconds)
    before = run.best_loss
    halvings, history = 0, [(0, before)]
    bar = iter(track(range(steps), f"refining {name}"))
    while budget.spent() < 1:
        healthy = run.follow(budget, rate, history, bar)
        run.restore()
        if healthy or halvings == HALVINGS:
            break
        rate, halvings = rate / 2, halvings + 1
    return Stage(
        name=name,
        steps=budget.done,
        seconds=budget.elapsed(),
        rate=rate,
        before=before,
        after=run.best_loss,
        kept=run.best_loss < before,
        halvings=halvings,
        history=history,
    )


class _Descent:
    """The state of one descent: parameters, the best of them so far, the order of batches."""

    def __init__(self, parameters: Sequence[nn.Parameter], objective: Objective, seed: int) -> None:
        self.parameters, self.objective = list(parameters), objective
        self.random, self.queue = random.Random(seed), list[int]()
        self.best = snapshot(self.parameters)
        self.best_loss = objective.held_out()

    def restore(self) -> None:
        restore(self.parameters, self.best)

    def look(self) -> float:
        """The held-out loss now; remembers the state if it is the best."""
        loss = self.objective.held_out()
        if math.isfinite(loss) and loss < self.best_loss:
            self.best, self.best_loss = snapshot(self.parameters), loss
        return loss

    def optimizer(self) -> torch.optim.Adam:
        groups = [
            {"params": [p], "size": max(FLOOR, float(p.detach().square().mean().sqrt()))} for p in self.parameters
        ]
        return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-12)

    def step(self, optimizer: torch.optim.Adam, rate: float) -> bool:
        """One step on the next batch; False, and no step, if the loss or a gradient is not finite."""
        if not self.queue:
            self.queue = list(range(self.objective.batches))
            self.random.shuffle(self.queue)
        optimizer.zero_grad(set_to_none=True)
        loss = self.objective.train(self.queue.pop())
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not math.isfinite(loss) or not all(bool(torch.isfinite(g).all()) for g in gradients):
            return False
        for group in optimizer.param_groups:
            group["lr"] = rate * group["size"]
        optimizer.step()
        return True

    def follow(self, budget: Budget, rate: float, history: list[tuple[int, float]], bar: Any) -> bool:
        """Descend until the budget is spent; False if the loss ran away. The schedule starts where this call does."""
        optimizer, first, looks = self.optimizer(), budget.spent(), 0
        limit = DIVERGED * max(history[0][1], 1e-12)
        while (spent := budget.spent()) < 1:
            share = (spent - first) / (1 - first)
            sound = self.step(optimizer, rate * schedule(share))
            budget.done += 1
            next(bar, None)
            share = (budget.spent() - first) / (1 - first)
            if sound and share < min(1.0, (looks + 1) / CHECKS):
                continue
            looks = int(share * CHECKS + 1e-9)
            loss = self.look() if sound else math.nan
            if not math.isfinite(loss):
                return False
            history.append((budget.done, loss))
            if loss > limit:
                return False
        return True


def schedule(share: float) -> float:
    """Factor on the rate after `share` of the steps: linear warm-up, then half a cosine."""
    warm = min(1.0, (share + 1e-2) / WARM_UP)
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def snapshot(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], saved: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)
