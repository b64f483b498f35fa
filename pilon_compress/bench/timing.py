"""Time variants in turns in one process, so that ratios within a turn mean something on a busy machine too."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pilon_compress.results.benchmark import Timing

FLUSH = 96 * 2**20  # bytes that evict everything else from a CPU's caches
BULK = 256 * 2**20  # bytes read to measure the memory bandwidth: more than any cache holds


@dataclass(frozen=True)
class Times:
    """Seconds of every variant, one value per round; the variants of a round ran right after each other."""

    seconds: Mapping[str, list[float]]

    def summary(self, name: str, baseline: str) -> Timing:
        """Return median and least seconds of a variant, and its speedup over the baseline."""
        own, reference = self.seconds[name], self.seconds[baseline]
        ratios = [slow / fast for slow, fast in zip(reference, own, strict=True)]
        tenths = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else ratios
        return Timing(
            seconds=statistics.median(own),
            least_seconds=min(own),
            speedup=statistics.median(ratios),
            spread=[tenths[0], tenths[-1]],
        )


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, cold: bool) -> Times:
    """Time every variant once per round, after flushing the caches if `cold`; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    flushed = torch.zeros(FLUSH // 4, device=device)
    names = list(variants)
    gc.collect()
    gc.disable()  # a collection would count against the variant in which it happens
    try:
        for turn in range(rounds + 1):
            for name in names:
                if cold:
                    flushed.sum()
                took = once(variants[name], device)
                if turn:
                    seconds[name].append(took)
            names = names[1:] + names[:1]  # so that no variant always follows the same one
    finally:
        gc.enable()
    return Times(seconds)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, including the device's work.

    One CPU thread is timed by its CPU time, which excludes other processes. By wall-clock time, long calls on a busy
    machine are interrupted more often than short ones, which would favour the short ones.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait(device)
    start = clock()
    run()
    wait(device)
    return clock() - start


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device) -> float:
    """Return the most bytes per second that the threads in use read from memory, of eight trials."""
    block = torch.zeros(BULK // 4, device=device)
    return BULK / min(once(block.sum, device) for _ in range(8))
