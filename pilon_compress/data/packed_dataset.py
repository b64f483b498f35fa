"""Pack conversations into blocks of equal length."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from pilon_compress.data.batch import IGNORED, Batch, from_windows
from pilon_compress.data.token_files import TokenFile
from pilon_compress.errors import BadInput


class PackedDataset:
    """Training rows of complete documents of a token file, as many as fit a block of `length` tokens.

    Documents of a block do not attend to each other. A longer document is truncated, and left out if nothing in it is
    scored then: `cut` and `dropped` count both.
    """

    def __init__(self, tokens: TokenFile, length: int) -> None:
        """Assign documents to blocks. Raises BadInput if no document has scored tokens."""
        self.tokens = tokens
        self.length = length
        sizes = np.diff(tokens.starts, append=len(tokens))
        self._sizes = np.minimum(sizes, length + 1)
        usable = np.flatnonzero([self._is_scored(document) for document in range(len(sizes))])
        if not len(usable):
            raise BadInput(
                f"{tokens.about.source}: no answer begins within the first {length} tokens: raise data.sequence_length"
            )
        self.dropped = len(sizes) - len(usable)
        self.cut = int((sizes[usable] > length + 1).sum())
        self._blocks = [usable[block].tolist() for block in best_fit(self._sizes[usable].tolist(), length + 1)]

    def _is_scored(self, document: int) -> bool:
        begin, size = int(self.tokens.starts[document]), int(self._sizes[document])
        return size > 1 and (self.tokens.scored is None or bool(self.tokens.scored[begin + 1 : begin + size].any()))

    def __len__(self) -> int:
        return len(self._blocks)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the blocks of `indices`, in this order."""
        shape = (len(indices), self.length + 1)
        windows = np.full(shape, self.tokens.about.eos, np.int64)
        starts, scored = np.zeros(shape, bool), np.zeros(shape, bool)
        sizes = np.zeros(len(indices), np.int64)
        for row, index in enumerate(indices):
            for document in self._blocks[index]:
                place, begin, size = int(sizes[row]), int(self.tokens.starts[document]), int(self._sizes[document])
                windows[row, place : place + size] = self.tokens.ids[begin : begin + size]
                marks = True if self.tokens.scored is None else self.tokens.scored[begin : begin + size]
                scored[row, place : place + size] = marks
                starts[row, place] = True
                sizes[row] += size
        tensors = (torch.from_numpy(windows), torch.from_numpy(starts), torch.from_numpy(sizes))
        batch = from_windows(*tensors, respect_documents=True)
        return replace(batch, labels=batch.targets.masked_fill(~torch.from_numpy(scored)[:, 1:], IGNORED))


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Group the indices of `sizes` so that sums are at most `room`: best fit, in decreasing order of size."""
    groups: list[list[int]] = []
    left: list[list[int]] = [[] for _ in range(room + 1)]  # groups by their remaining room
    occupied = np.zeros(room + 1, bool)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        best = size + int(occupied[size:].argmax())
        if occupied[best]:
            group = left[best].pop()
            occupied[best] = bool(left[best])
        else:
            group, best = len(groups), room
            groups.append([])
        groups[group].append(index)
        left[best - size].append(group)
        occupied[best - size] = True
    return groups
