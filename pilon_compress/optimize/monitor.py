"""Report a run while it trains: a live line on stderr, metrics.jsonl, and trackers."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pilon_compress.io.disk import write_atomic
from pilon_compress.io.progress import open_console, say
from pilon_compress.optimize.trackers import open_tracker

METRICS = "metrics.jsonl"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
"""Dense bfloat16, from the vendor's data sheets; MFU is shown for these GPUs only."""


class Monitor:
    """Receives the figures of a run, on its first process.

        with Monitor(output, steps, start, trackers) as monitor:
            monitor.log(step, {...})         a line of metrics.jsonl, and to the trackers
            monitor.show(step, loss=...)     the live line

    On resuming, lines of metrics.jsonl after step `start` are dropped: they will be written again.
    """

    def __init__(self, output: Path, steps: int, start: int, trackers: list[str], quiet: bool = False) -> None:
        self.path, self.start = output / METRICS, start
        lines = [line for line in _lines(self.path) if line.get("step", 0) <= start] if start else []
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.trackers = [open_tracker(name, output) for name in trackers]
        console = open_console()
        self.live = console.is_terminal and not quiet
        self.quiet = quiet
        columns = (
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, transient=True, disable=not self.live)
        self.task = self.bar.add_task("training", total=steps, completed=start, figures="")

    def __enter__(self) -> "Monitor":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        for tracker in self.trackers:
            tracker.close()

    def log(self, step: int, figures: dict[str, Any]) -> None:
        """Append one line, and pass the numbers on to the trackers."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for tracker in self.trackers:
            tracker.log(step, {key: value for key, value in figures.items() if isinstance(value, int | float)})

    def show(self, step: int, figures: dict[str, Any]) -> None:
        """Move the bar; its figures change when there are new ones."""
        self.bar.update(self.task, completed=step)
        if figures:
            self.bar.update(self.task, figures=summary(figures))

    def say(self, message: str) -> None:
        """A line that stays: above the bar, or on stderr where no bar is drawn."""
        if self.quiet:
            return
        if self.live:
            self.bar.console.print(message, highlight=False, markup=False)
        else:
            say(message)


def summary(figures: dict[str, Any]) -> str:
    """The figures of one line, for people."""
    parts = []
    if "loss" in figures:
        parts.append(
            f"loss {figures['loss']:.3f}  perplexity {math.exp(min(20, figures.get('nll', figures['loss']))):.1f}"
        )
    if "tokens_per_second" in figures:
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    if figures.get("mfu"):
        parts.append(f"MFU {figures['mfu']:.0%}")
    if "memory_gib" in figures:
        parts.append(f"{figures['memory_gib']:.1f} GiB")
    return "  ".join(parts)


def memory_gib(device: torch.device) -> float:
    """Peak memory allocated on a GPU, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Share of the GPU's peak; None where the peak is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((value for key, value in PEAK_FLOPS.items() if key in name), None)
    return None if peak is None else flops_per_second / peak


class Clock:
    """Seconds and tokens since the last look."""

    def __init__(self) -> None:
        self.began, self.tokens = time.perf_counter(), 0

    def look(self) -> tuple[float, int]:
        """Return seconds and tokens since the last call, and start anew."""
        now = time.perf_counter()
        seconds, tokens = now - self.began, self.tokens
        self.began, self.tokens = now, 0
        return seconds, tokens


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of an output's metrics.jsonl; lines that are damaged or were cut short are left out."""
    return _lines(output / METRICS)


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # cut short, or damaged
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            found.append(entry)
    return found
