"""In which order a training run sees its rows: a function of seed and step, so that nothing else need be kept."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pilon_compress.data.batch import Batch

ROUNDS = 8  # of the Feistel network; four make a permutation that passes for random


class Rows(Protocol):
    """Training data: a number of rows, any of which can be asked for."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> Batch: ...


class Loader:
    """Batches of a run: the rows in epochs without end, each a permutation of its own, `batch_size` rows per step.

    A batch depends on `seed` and the step alone: a run goes on exactly by naming its next step. The rows of a step are
    dealt out over `world` ranks times `micro_batches`; together they are the same rows whatever these two are.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, micro_batches: int = 1) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.micro_batches = micro_batches

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> Batch:
        """One rank's share of one micro batch. Shares differ by one row at most.

        Every rank must take part in every forward pass, so a share of nothing is a row without labels.
        """
        indices = self.indices(step)
        return _share(self.rows, indices, micro * world + rank, self.micro_batches * world)

    def scored(self, step: int) -> int:
        """How many tokens all shares of the step score: what to divide their summed losses by, on every rank."""
        return self.rows.rows(self.indices(step)).scored

    def indices(self, step: int) -> list[int]:
        """The rows of a step, of all ranks and micro batches."""
        first = step * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), len(self.rows))
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            found[epochs == epoch] = permuted(places[epochs == epoch], len(self.rows), self.seed, int(epoch))
        return [int(index) for index in found]

    def epoch(self, step: int) -> float:
        """How many times the rows have been seen before `step`."""
        return step * self.batch_size / len(self.rows)


def in_order(rows: Rows, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """One rank's share of all rows, each once: for validation. Every rank gets the same number of batches."""
    for first in range(0, len(rows), batch_size):
        yield _share(rows, range(first, min(first + batch_size, len(rows))), rank, world)


def _share(rows: Rows, indices: Sequence[int], share: int, shares: int) -> Batch:
    first, last = (len(indices) * edge // shares for edge in (share, share + 1))
    return rows.rows(indices[first:last]) if first < last else rows.rows(indices[:1]).unscored()


def permuted(places: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a permutation of `range(count)`, chosen by `seed` and `epoch`, sends `places`.

    A Feistel network permutes the smallest range of 4^n numbers that holds `count`; what falls outside goes through it
    again. Unlike a stored permutation it takes no memory, and unlike a library's generator it never changes.
    """
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    keys = np.frombuffer(blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")
    found = _feistel(places.astype(np.uint64), half, keys)
    while (outside := found >= count).any():
        found[outside] = _feistel(found[outside], half, keys)
    return found.astype(np.int64)


def _feistel(numbers: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    ones = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & ones
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & ones)
    return (left << half) | right


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the number."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
