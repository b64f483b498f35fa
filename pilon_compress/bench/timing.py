"""Timing that means something on a busy machine: variants take turns in one process; ratios are taken within turns."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

FLUSH = 96 * 2**20  # bytes that push everything else out of a CPU's caches
BULK = 256 * 2**20  # bytes to measure the memory bandwidth with: more than any cache


@dataclass(frozen=True)
class Times:
    """Seconds of every variant, one figure per round; the variants of a round ran right after each other."""

    seconds: Mapping[str, list[float]]

    def summary(self, name: str, baseline: str) -> dict[str, Any]:
        """Median and least seconds; `speedup` over the baseline: median of the rounds, `spread`: their 10th and 90th
        percentile."""
        own, reference = self.seconds[name], self.seconds[baseline]
        ratios = [slow / fast for slow, fast in zip(reference, own, strict=True)]
        tenths = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios
        return {
            "seconds": statistics.median(own),
            "least_seconds": min(own),
            "speedup": statistics.median(ratios),
            "spread": [tenths[0], tenths[-1]],
        }


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, cold: bool) -> Times:
    """Run every variant once per round, each after flushing the caches if `cold`; a first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    flushed = torch.zeros(FLUSH // 4, device=device)
    names = list(variants)
    gc.collect()
    gc.disable()  # a collection in the middle of one variant would count against it
    try:
        for turn in range(rounds + 1):
            for name in names:
                if cold:
                    flushed.sum()
                took = once(variants[name], device)
                if turn:
                    seconds[name].append(took)
            names = names[1:] + names[:1]  # nobody always comes after the same one
    finally:
        gc.enable()
    return Times(seconds)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included.

    One CPU thread is timed by the CPU's own account: what others compute meanwhile does not count. By the wall clock, a
    long call of a busy machine is interrupted and a short one is not, which would flatter the short ones.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait(device)
    start = clock()
    run()
    wait(device)
    return clock() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that the threads in use read from memory, at best."""
    block = torch.zeros(BULK // 4, device=device)
    return BULK / min(once(block.sum, device) for _ in range(8))
