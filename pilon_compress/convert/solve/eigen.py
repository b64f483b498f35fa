"""Eigenvalues of symmetric matrices, on one thread where that is faster.

LAPACK's divide and conquer is hundreds of short parallel regions: a matrix of 576 rows takes 17 ms on one thread, 16 on
two that spin while they wait and have the cores to themselves, 90 on two that sleep, 300 on two that spin on busy cores
(docs/log.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SERIAL = 2000  # rows up to which one thread is at least as fast as two


def eigenvalues(square: Tensor) -> Tensor:
    """Return the eigenvalues (d,) of a symmetric matrix (d, d), smallest first."""
    with _threads(square):
        return torch.linalg.eigvalsh(square)


def eigenvectors(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (d,) of a symmetric matrix (d, d), smallest first, and eigenvectors (d, d) as columns."""
    with _threads(square):
        values, vectors = torch.linalg.eigh(square)
    return values, vectors


@contextmanager
def _threads(square: Tensor) -> Iterator[None]:
    """Use one thread inside the block for a small matrix on the CPU."""
    threads = torch.get_num_threads()
    if square.is_cuda or len(square) > SERIAL or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
