"""Compute position, phase and ETA of a command from its stages and running loops."""

import time
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress

EARLIEST = 0.01  # share of the total that must be done before an ETA is given


@dataclass(eq=False)
class Phase:
    """A loop that `track` runs: items done of `total`, None if unknown; `inner`: share done of the next item."""

    description: str
    total: int | None
    done: int = 0
    inner: float = 0.0

    @property
    def share(self) -> float:
        """Return the share that is done, from 0 to 1; 0 where the total is unknown."""
        return min(1.0, (self.done + self.inner) / self.total) if self.total else 0.0

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.description} {self.done}" if self.done else self.description
        return f"{self.description} {self.done}/{self.total}"


@dataclass
class Line:
    """The position of a command: its stages (name, weight), its current stage, and its loops, outermost first."""

    weights: list[tuple[str, float]]
    quiet: bool
    stage: int = -1
    reached: float = 0.0  # share done of the stage; never falls
    phases: list[Phase] = field(default_factory=list)
    title: str = ""
    began: float = field(default_factory=lambda: time.monotonic())
    bar: Progress | None = None
    task: Any = None

    def enter(self, name: str) -> None:
        """Enter the stage `name` for work that `track` does not count."""
        self.title = name
        self._step_to(name)
        self.draw()

    def begin(self, phase: Phase) -> None:
        """Add a loop, which may begin a stage."""
        if not self.phases:
            self.title = ""
            self._step_to(phase.description)
        self.phases.append(phase)
        self.draw()

    def advance(self) -> None:
        """Update the position from the running loops."""
        for outer, inner in zip(self.phases[-2::-1], self.phases[:0:-1], strict=True):
            outer.inner = max(outer.inner, inner.share) if inner.share < 1 else outer.inner
        if self._counts():
            self.reached = max(self.reached, self.phases[0].share)
        self.draw()

    def end(self, phase: Phase) -> None:
        """Remove a loop, which may complete its stage."""
        if len(self.phases) == 1 and self._counts():
            self.reached = 1.0
        self.phases.remove(phase)
        if not self.phases:
            self.title = phase.description  # until the next loop begins
        self.draw()

    @property
    def total(self) -> float:
        """Return the weight of all stages."""
        return sum(weight for _, weight in self.weights)

    @property
    def known(self) -> bool:
        """Return True if the total is known, unlike that of a single loop over items without a length."""
        endless = len(self.weights) == 1 and self.phases and self.phases[0].total is None
        return self.total > 0 and not endless

    @property
    def position(self) -> float:
        """Return the weight of all that is done."""
        if self.stage < 0:
            return 0.0
        before = sum(weight for _, weight in self.weights[: self.stage])
        return before + self.reached * self.weights[self.stage][1]

    @property
    def remaining(self) -> float:
        """Return the seconds left at the average speed; NaN until a share EARLIEST is done."""
        if not self.known or self.position < EARLIEST * self.total:
            return float("nan")
        return (self.total / self.position - 1) * (time.monotonic() - self.began)

    def describe(self) -> str:
        """Return percentage, phase with its own count, elapsed time and ETA, as plain text."""
        share = f"{self.position / self.total:4.0%}  " if self.known else ""
        elapsed = time.monotonic() - self.began
        return f"{share}{self._phase()}  {clock(elapsed)} elapsed, ETA {clock(self.remaining)}"

    def draw(self) -> None:
        """Update the progress bar, if there is one."""
        if self.bar is not None:
            self.bar.update(self.task, completed=self.position, total=self.total if self.known else None)

    def _phase(self) -> str:
        return " > ".join(map(str, self.phases)) or self.title

    def _counts(self) -> bool:
        return self.stage >= 0 and self.phases[0].description.startswith(self.weights[self.stage][0])

    def _step_to(self, name: str) -> None:
        """Move to the stage with which `name` begins: the current one while it is not complete, or a later one."""
        first = max(self.stage + (self.reached >= 1), 0)
        for index in range(first, len(self.weights)):
            if name.startswith(self.weights[index][0]):
                if index != self.stage:
                    self.stage, self.reached = index, 0.0
                return


def clock(seconds: float) -> str:
    """Return h:mm:ss, or m:ss below an hour, or -:-- for NaN."""
    if seconds != seconds:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
