"""Progress on stderr: one line for a whole command, with its position, its phase and an ETA.

Nothing is shown until it is switched on: `visible(True)` for a stretch of work, `switch_on()` for the command line.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

from pilon_compress.io.messages import release_notes

T = TypeVar("T")

CHECKS: list[Callable[[], None]] = []  # called at every iteration of `track`; may raise to end the command
INTERVAL = 30.0  # seconds between two lines where stderr is no terminal
EARLIEST = 0.01  # share of the whole that must be done before an ETA is given

_on = False  # True where progress is shown
_current: list["Line"] = []  # the line that is being shown, if any


@dataclass(eq=False)
class Phase:
    """A loop that `track` runs: items done of `total`, if that is known; `inner`: progress within the next item."""

    description: str
    total: int | None
    done: int = 0
    inner: float = 0.0

    @property
    def share(self) -> float:
        return min(1.0, (self.done + self.inner) / self.total) if self.total else 0.0

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.description} {self.done}" if self.done else self.description
        return f"{self.description} {self.done}/{self.total}"


def switch_on() -> None:
    """Show progress from now on."""
    global _on
    _on = True


@contextmanager
def visible(on: bool) -> Iterator[None]:
    """Show progress within the block, or keep it hidden."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`; where progress is on, a line on stderr shows how many are done and how long the rest will take.

    `total` is needed only for items without a length. Within `stages` the line is that of the whole command. Where
    stderr is no terminal, a plain line comes every `INTERVAL` seconds. `CHECKS` are called before every item.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    phase = Phase(description, total)
    if _current:
        yield from _counted(items, phase, _current[-1])
        return
    with _shown(Line([(description, 1.0)], quiet=False)) as line:
        yield from _counted(items, phase, line)


@contextmanager
def stages(weights: Sequence[tuple[str, float]], quiet: bool = False) -> Iterator["Line"]:
    """Show one line for all that `track` counts inside: position and ETA of the whole, the phase and its own count.

    `weights`: the stages in their order, each a name and its expected time, in any unit. A phase belongs to the next
    stage, from the current one on, that its description begins with; stages before that count as done. A phase that no
    stage names is shown and moves nothing. The same name twice stands for two phases.
    """
    if _current:  # a command within a command
        yield _current[-1]
        return
    with _shown(Line(list(weights), quiet)) as line:
        yield line


def say(message: str) -> None:
    """Write a line to stderr, above the progress that is shown. Never raises: a stderr may be closed or full."""
    if _current and _current[-1].bar is not None:
        _current[-1].bar.console.print(message, highlight=False, markup=False, soft_wrap=True)
    else:
        stderr = Stderr()
        stderr.write(f"{message}\n")
        stderr.flush()


class Stderr:
    """sys.stderr as it is now, less its errors: a line of progress is not worth a run.

    Bound when it is made, since rich puts itself in the place of sys.stderr while a line is live.
    """

    def __init__(self) -> None:
        self.stream = sys.stderr  # None where Python has none
        self.encoding: str = getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):  # full, closed, or None
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return self.stream.isatty()
        return False

    def fileno(self) -> int:
        return self.stream.fileno()


@dataclass
class Line:
    """The position of a command: its stages, the stage that it is in, and the loops that run, outermost first."""

    weights: list[tuple[str, float]]
    quiet: bool
    stage: int = -1
    reached: float = 0.0  # share of the stage; never falls
    phases: list[Phase] = field(default_factory=list)
    title: str = ""
    began: float = field(default_factory=lambda: time.monotonic())
    bar: Progress | None = None
    task: Any = None

    def enter(self, name: str) -> None:
        """Enter the stage `name`, for work that `track` does not count."""
        self.title = name
        self._step_to(name)
        self.draw()

    def begin(self, phase: Phase) -> None:
        if not self.phases:
            self.title = ""
            self._step_to(phase.description)
        self.phases.append(phase)
        self.draw()

    def advance(self) -> None:
        """Take over what the loops have done."""
        for outer, inner in zip(self.phases[-2::-1], self.phases[:0:-1], strict=True):
            outer.inner = max(outer.inner, inner.share) if inner.share < 1 else outer.inner
        if self._counts():
            self.reached = max(self.reached, self.phases[0].share)
        self.draw()

    def end(self, phase: Phase) -> None:
        if len(self.phases) == 1 and self._counts():
            self.reached = 1.0
        self.phases.remove(phase)
        if not self.phases:
            self.title = phase.description  # until the next one begins
        self.draw()

    @property
    def total(self) -> float:
        return sum(weight for _, weight in self.weights)

    @property
    def known(self) -> bool:
        """True if the position of the whole can be told: not for a single loop over items without a length."""
        endless = len(self.weights) == 1 and self.phases and self.phases[0].total is None
        return self.total > 0 and not endless

    @property
    def position(self) -> float:
        """Weight of what is done."""
        if self.stage < 0:
            return 0.0
        before = sum(weight for _, weight in self.weights[: self.stage])
        return before + self.reached * self.weights[self.stage][1]

    @property
    def remaining(self) -> float:
        """Seconds that are left at the speed until now; NaN as long as too little is done to tell."""
        if not self.known or self.position < EARLIEST * self.total:
            return float("nan")
        return (self.total / self.position - 1) * (time.monotonic() - self.began)

    def describe(self) -> str:
        """Percentage, phase with its own count, elapsed time and ETA, as plain text."""
        share = f"{self.position / self.total:4.0%}  " if self.known else ""
        elapsed = time.monotonic() - self.began
        return f"{share}{self._phase()}  {_clock(elapsed)} elapsed, ETA {_clock(self.remaining)}"

    def draw(self) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.position, total=self.total if self.known else None)

    def _phase(self) -> str:
        return " > ".join(map(str, self.phases)) or self.title

    def _counts(self) -> bool:
        return self.stage >= 0 and self.phases[0].description.startswith(self.weights[self.stage][0])

    def _step_to(self, name: str) -> None:
        """Move to the stage of that name: the current one while it is not complete, or one behind it."""
        first = max(self.stage + (self.reached >= 1), 0)
        for index in range(first, len(self.weights)):
            if name.startswith(self.weights[index][0]):
                if index != self.stage:
                    self.stage, self.reached = index, 0.0
                return


def _counted(items: Iterable[T], phase: Phase, line: Line) -> Iterator[T]:
    line.begin(phase)
    try:
        for item in items:
            for check in CHECKS:
                check()
            yield item
            phase.done, phase.inner = phase.done + 1, 0.0
            line.advance()
    finally:
        line.end(phase)


def open_console() -> Console:
    """Return a console on stderr whose errors end nothing."""
    stream: Any = Stderr()
    return Console(file=stream, emoji=False)


@contextmanager
def _shown(line: Line) -> Iterator[Line]:
    """Show `line` until the end: live on a terminal, else as a plain line every `INTERVAL` seconds."""
    _current.append(line)
    try:
        if not _on or line.quiet or os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
            yield line
            return
        console = open_console()
        if not console.is_terminal:
            with _reporting(line):
                yield line
            return
        columns = (BarColumn(bar_width=24), _Description(line))
        with Progress(*columns, console=console, transient=True) as bar:
            line.bar, line.task = bar, bar.add_task("", total=None)
            line.draw()
            yield line
    finally:
        line.bar = None
        _current.remove(line)


@contextmanager
def _reporting(line: Line) -> Iterator[None]:
    """Write the line every `INTERVAL` seconds, even while an item takes longer."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(INTERVAL):
            release_notes()
            say(line.describe().strip())

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Description(ProgressColumn):
    """`Line.describe`, recomputed whenever the line is drawn."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def render(self, task: Task) -> Text:
        return Text(self.line.describe(), no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    """h:mm:ss, or –:–– where it is not known."""
    if seconds != seconds:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
