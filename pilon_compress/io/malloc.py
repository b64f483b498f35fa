"""Return freed memory to the operating system, so that a process is no larger than the memory that it uses."""

import ctypes
import sys

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
LARGE, SCARCE = 2**24, 2**20  # bytes from which an allocation is mapped on its own


def give_back_freed(scarce: bool) -> None:
    """Let glibc map every allocation above 16 MiB, or above 1 MiB where memory is `scarce`, on its own.

    glibc's default threshold grows with freed blocks, up to 32 MiB; matrices of many sizes then leave holes in the
    heap. The lower threshold costs a fifth of the time on small models (docs/results/scale.md). Does nothing on systems
    other than Linux.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP, SCARCE if scarce else LARGE)
            mallopt(TRIM, SCARCE if scarce else LARGE)


def trim() -> None:
    """Return free memory inside the heap; after a stage, matrices below the threshold leave holes there."""
    if sys.platform == "linux":
        shrink = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if shrink is not None:
            shrink(0)
