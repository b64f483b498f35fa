"""Show progress on stderr: one line for the complete command, with its position, its phase and an ETA.

Nothing is shown until it is switched on: `visible(True)` for a block, `switch_on()` for the command line.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

from pilon_compress.io.messages import release_notes
from pilon_compress.io.progress_line import Line, Phase

T = TypeVar("T")

CHECKS: list[Callable[[], None]] = []  # called at every iteration of `track`; may raise to end the command
INTERVAL = 30.0  # seconds between two lines where stderr is not a terminal

_on = False  # True where progress is shown
_current: list[Line] = []  # the line that is being shown, if any


def switch_on() -> None:
    """Show progress from now on."""
    global _on
    _on = True


@contextmanager
def visible(on: bool) -> Iterator[None]:
    """Show progress inside the block, or hide it."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`; if progress is on, a line on stderr shows how many are done and how long the rest will take.

    `total`: number of items, for items without a length. Inside `stages` the line is that of the complete command.
    Where stderr is not a terminal, a plain line is printed every `INTERVAL` seconds. `CHECKS` are called before every
    item.
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
def stages(weights: Sequence[tuple[str, float]], quiet: bool = False) -> Iterator[Line]:
    """Show one line for all loops of `track` inside the block: total position and ETA, and the current loop's count.

    `weights`: the stages in order, each a name and its expected time, in any unit. A loop belongs to the next stage,
    from the current one on, with whose name its description begins; stages before it then count as done. A loop without
    a stage is shown but does not move the position. Two stages may have equal names. `quiet` shows nothing.
    """
    if _current:  # a command inside a command
        yield _current[-1]
        return
    with _shown(Line(list(weights), quiet)) as line:
        yield line


def say(message: str) -> None:
    """Write a line to stderr, above the progress line. Never raises, even if stderr is closed or full."""
    if _current and _current[-1].bar is not None:
        _current[-1].bar.console.print(message, highlight=False, markup=False, soft_wrap=True)
    else:
        stderr = Stderr()
        stderr.write(f"{message}\n")
        stderr.flush()


class Stderr:
    """The current sys.stderr without its errors, since a run should not end because of a line of progress.

    It is bound early, because rich replaces sys.stderr while a progress line is shown.
    """

    def __init__(self) -> None:
        self.stream = sys.stderr  # None where Python has none
        self.encoding: str = getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text` if possible, and return its length."""
        with suppress(OSError, ValueError, AttributeError):  # full, closed, or None
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if possible."""
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Return True for a terminal."""
        with suppress(OSError, ValueError, AttributeError):
            return self.stream.isatty()
        return False

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return self.stream.fileno()


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
    """Return a console on stderr that raises no errors of the stream."""
    stream: Any = Stderr()
    return Console(file=stream, emoji=False)


@contextmanager
def _shown(line: Line) -> Iterator[Line]:
    """Show `line` inside the block: live on a terminal, else as a plain line every `INTERVAL` seconds."""
    _current.append(line)
    try:
        if not _on or line.quiet or os.environ.get("RANK", "0") != "0":  # only the first of several processes prints
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
    """Print the line every `INTERVAL` seconds, even while an item takes longer."""
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
    """A column of `Line.describe`, computed whenever rich draws it."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def render(self, task: Task) -> Text:
        return Text(self.line.describe(), no_wrap=True, overflow="ellipsis")
