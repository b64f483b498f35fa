"""A token file cut into blocks."""

from collections.abc import Sequence

import numpy as np
import torch

from pilon_compress.train.batch import Batch, from_windows
from pilon_compress.train.tokens import TokenFile


class Blocks:
    """The blocks of `length` tokens of a token file, each followed by the token that its last one predicts.

    Neighbours overlap by that token, so that over all blocks every token but the first is predicted exactly once; the
    last block is padded. With `respect_documents` no document sees another, and neither is the first token of one
    predicted from the end of the one before.
    """

    def __init__(self, tokens: TokenFile, length: int, respect_documents: bool = False) -> None:
        self.tokens = tokens
        self.length = length
        self.respect_documents = respect_documents

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.length)

    def rows(self, indices: Sequence[int]) -> Batch:
        """The blocks with these indices, in this order."""
        width = self.length + 1
        windows = np.full((len(indices), width), self.tokens.about.eos, np.int64)
        starts = np.zeros((len(indices), width), bool)
        sizes = np.zeros(len(indices), np.int64)
        for row, index in enumerate(indices):
            begin = index * self.length
            found = self.tokens.ids[begin : begin + width]
            windows[row, : len(found)] = found
            sizes[row] = len(found)
            first, last = np.searchsorted(self.tokens.starts, (begin, begin + len(found)))
            starts[row, self.tokens.starts[first:last] - begin] = True
        made = (torch.from_numpy(windows), torch.from_numpy(starts), torch.from_numpy(sizes))
        return from_windows(*made, self.respect_documents)
