"""Order the rows of a training run: a function of seed and step, so that a run resumes without other state."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pilon_compress.data.batch import Batch

ROUNDS = 8  # of the Feistel network; four already give a permutation that passes tests of randomness


class Dataset(Protocol):
    """Training data: `len` rows with random access."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the rows of `indices`, in this order."""
        ...


class Loader:
    """Endless batches of a dataset: every epoch is a new permutation of the rows, `batch_size` rows per step.

    A batch depends on `seed` and the step alone, so that a run continues from any step. The rows of a step are divided
    among `world` ranks times `micro_batches`; together they do not depend on these two numbers.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, micro_batches: int = 1) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.micro_batches = micro_batches

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> Batch:
        """Return one rank's share of one micro batch; shares differ by at most one row.

        An empty share is a row without labels, because every rank must run every forward pass.
        """
        indices = self.indices(step)
        return _share(self.dataset, indices, micro * world + rank, self.micro_batches * world)

    def scored(self, step: int) -> int:
        """Return the number of scored tokens in all shares of the step, by which their summed losses are divided."""
        return self.dataset.batch(self.indices(step)).scored

    def indices(self, step: int) -> list[int]:
        """Return the rows of a step, of all ranks and micro batches."""
        first = step * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), len(self.dataset))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = permuted(places[epochs == epoch], len(self.dataset), self.seed, int(epoch))
        return [int(index) for index in rows]

    def epoch(self, step: int) -> float:
        """Return the number of passes over the rows before `step`."""
        return step * self.batch_size / len(self.dataset)


class Shuffled:
    """Batches that are made already, one per step: in epochs without end, each in an order that depends on `seed`.

    The rows of a step are dealt out over `micro_batches`, for one process. A micro batch is the same object in every
    epoch.
    """

    def __init__(self, batches: Sequence[Batch], seed: int, micro_batches: int = 1) -> None:
        self.seed, self.parts = seed, [_parts(batch, micro_batches) for batch in batches]

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> Batch:
        """Return the micro batch `micro` of a step, in the order drawn for its epoch; for one process only."""
        assert world == 1, "batches that are made already are for one process"
        epoch, place = divmod(step, len(self.parts))
        (index,) = permuted(np.array([place]), len(self.parts), self.seed, epoch)
        return self.parts[int(index)][micro]


def _parts(batch: Batch, count: int) -> list[Batch]:
    """The rows of a batch in `count` shares; a share of nothing is a row that is not scored."""
    edges = [len(batch.input_ids) * edge // count for edge in range(count + 1)]
    if count == 1:
        return [batch]
    return [batch.rows(slice(a, b)) if a < b else batch.rows(slice(1)).unscored() for a, b in pairwise(edges)]


def in_order(dataset: Dataset, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Yield one rank's share of all rows, each once, for validation; every rank gets equally many batches."""
    for first in range(0, len(dataset), batch_size):
        yield _share(dataset, range(first, min(first + batch_size, len(dataset))), rank, world)


def _share(dataset: Dataset, indices: Sequence[int], share: int, shares: int) -> Batch:
    first, last = (len(indices) * edge // shares for edge in (share, share + 1))
    return dataset.batch(indices[first:last]) if first < last else dataset.batch(indices[:1]).unscored()


def permuted(places: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the images of `places` under a permutation of `range(count)` that `seed` and `epoch` choose.

    A Feistel network permutes the smallest range of 4^n integers from `count` on; images outside `count` go through it
    again. Unlike a stored permutation it takes no memory, and unlike a library's generator it never changes.
    """
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    keys = np.frombuffer(blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest(), "<u8")
    images = _feistel(places.astype(np.uint64), half, keys)
    while (outside := images >= count).any():
        images[outside] = _feistel(images[outside], half, keys)
    return images.astype(np.int64)


def _feistel(numbers: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    ones = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & ones
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & ones)
    return (left << half) | right


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of splitmix64: every bit of the result depends on every bit of the number."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
