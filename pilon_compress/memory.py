"""Memory that has been freed goes back to the operating system, so that a large conversion stays as small as it is."""

import ctypes
import sys

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
LARGE = 2**20


def give_back_freed() -> None:
    """Let glibc map allocations above 1 MiB each on its own; elsewhere nothing happens.

    Its threshold grows with what is freed, up to 32 MiB; matrices of many sizes then leave holes in the heap. A
    conversion of GPT-2 peaked a quarter higher (docs/results/scale.md).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP, LARGE)
            mallopt(TRIM, LARGE)
