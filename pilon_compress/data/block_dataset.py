"""Cut a token file into blocks of equal length."""

from collections.abc import Sequence

import numpy as np

from pilon_compress.data.batch import Batch, Row, from_rows
from pilon_compress.data.sequences import body_length
from pilon_compress.data.token_files import TokenFile


class BlockDataset:
    """Training rows of a token file: blocks of `length` tokens, each followed by the token that its last one predicts.

    Every block begins with the tokenizer's prefix (BOS). Neighbours overlap by one token, so that over all blocks every
    token but the first is predicted exactly once; the last block is padded. With `respect_documents` no document
    attends to another, nor does its last token predict the first one of the next.
    """

    def __init__(self, tokens: TokenFile, length: int, respect_documents: bool = False) -> None:
        self.tokens = tokens
        self.length = length
        self.respect_documents = respect_documents
        self.stride = body_length(length, tokens.about.prefix)

    def __len__(self) -> int:
        return max(1, -(-(len(self.tokens) - 1) // self.stride))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the blocks of `indices`, in this order."""
        pieces = []
        for index in indices:
            begin = index * self.stride
            ids = self.tokens.ids[begin : begin + self.stride + 1]
            first, last = np.searchsorted(self.tokens.starts, (begin, begin + len(ids)))
            starts = np.zeros(len(ids), bool)
            starts[self.tokens.starts[first:last] - begin] = True
            pieces.append(Row(ids, starts))
        about = self.tokens.about
        return from_rows(pieces, self.length, about.prefix, about.eos, self.respect_documents)
