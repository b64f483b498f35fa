"""Memory that has been freed goes back to the operating system, so that a large conversion stays as small as it is."""

import ctypes
import sys

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
LARGE, SCARCE = 2**24, 2**20


def give_back_freed(scarce: bool) -> None:
    """Let glibc map allocations above 16 MiB each on its own, or where memory is `scarce` above 1 MiB.

    Its own threshold grows with what is freed, up to 32 MiB; matrices of many sizes then leave holes in the heap. The
    lower one costs a fifth of the time on small models (docs/results/scale.md). On other systems nothing happens.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP, SCARCE if scarce else LARGE)
            mallopt(TRIM, SCARCE if scarce else LARGE)


def trim() -> None:
    """Give back what is free inside the heap: after a stage, many matrices below the threshold leave holes in it."""
    if sys.platform == "linux":
        shrink = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if shrink is not None:
            shrink(0)
