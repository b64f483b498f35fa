"""L-BFGS with a preconditioner (Nocedal, 1980; Liu and Nocedal, 1989), for losses that cost much more than their size.

A preconditioner that changes from point to point takes the place of the multiple of the identity that the recursion
starts from, scaled by the latest curvature as that is.
"""

from collections import deque
from collections.abc import Callable
from math import isfinite
from typing import Protocol, TypeVar

from torch import Tensor

MEMORY = 8  # 20 gave nothing more (docs/log.md)
DECREASE = 1e-4  # of what the slope promises: enough to accept a step
ROUNDING = 1e-7  # by which float32 may mistake a loss of order 1
SHORTEST = 1e-3
WINDOW = 8  # evaluations that must have lowered the loss


class Point(Protocol):
    """A place x with its loss, its gradient, and the preconditioner there."""

    x: Tensor
    loss: float

    @property
    def gradient(self) -> Tensor:
        """Return the gradient of the loss, of the shape of x."""

    def precondition(self, z: Tensor) -> Tensor:
        """Return the preconditioner applied to `z`, of the shape of x."""


P = TypeVar("P", bound=Point)


def minimise(at: Callable[[Tensor], P], start: Tensor, evaluations: int, tolerance: float) -> Tensor:
    """The best x found from `start` with so many evaluations of `at`.

    Ends early where WINDOW evaluations lowered the loss by less than `tolerance` of it.
    """
    point = at(start)
    best, lowest = start, [point.loss]  # the lowest loss after so many evaluations
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=MEMORY)
    while len(lowest) < evaluations:
        if len(lowest) > WINDOW and not lowest[-1] < lowest[-1 - WINDOW] * (1 - tolerance):
            break
        direction = -_newton(point, pairs)
        slope = float((direction * point.gradient).sum())
        step, trial = 1.0, None
        while slope < 0 and step >= SHORTEST and len(lowest) < evaluations:
            trial = at(point.x + step * direction)
            best = trial.x if trial.loss < lowest[-1] else best
            lowest.append(min(lowest[-1], trial.loss))  # in this order NaN is not the least
            if trial.loss <= point.loss + DECREASE * step * slope + ROUNDING:
                break
            rise = (trial.loss - point.loss) / step - slope  # of a parabola through both ends
            step *= min(0.5, max(0.1, -slope / (2 * rise))) if isfinite(rise) else 0.1
            trial = None
        if trial is None:
            if not pairs:
                break
            pairs.clear()  # once more, along the preconditioned gradient
            continue
        moved, turned = trial.x - point.x, trial.gradient - point.gradient
        curvature = float((moved * turned).sum())
        if curvature > 0:
            pairs.append((moved, turned, curvature))
        point = trial
    return best


def _newton(point: Point, pairs: deque[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The two-loop recursion: about the inverse Hessian times the gradient."""
    z, shares = point.gradient, []
    for moved, turned, curvature in reversed(pairs):
        shares.append(float((moved * z).sum()) / curvature)
        z = z - shares[-1] * turned
    z = point.precondition(z)
    if pairs:
        _, turned, curvature = pairs[-1]
        z = curvature / float((turned * point.precondition(turned)).sum()) * z
    for (moved, turned, curvature), share in zip(pairs, reversed(shares), strict=True):
        z = z + (share - float((turned * z).sum()) / curvature) * moved
    return z
