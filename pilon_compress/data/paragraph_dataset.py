"""Batches of separate texts for encoders: one paragraph per row, padded to the longest of its batch."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pilon_compress.data import text
from pilon_compress.data.batch import Batch
from pilon_compress.data.loader import Dataset, Loader
from pilon_compress.data.token_files import (
    PARTS,
    UINT16_IDS,
    Metadata,
    Part,
    TokenFile,
    TokenizedDocument,
    cached,
    fingerprint,
)

TEXTS = 256  # per call of the tokenizer


class ParagraphDataset:
    """Training rows of a token file whose documents are separate texts; `padding` is the id that fills rows."""

    def __init__(self, tokens: TokenFile, padding: int) -> None:
        self.tokens, self.padding = tokens, padding
        self.sizes: NDArray[np.int64] = np.diff(tokens.starts, append=len(tokens))

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the texts of `indices`, all scored, padded to the longest."""
        longest = int(max(self.sizes[index] for index in indices))
        ids = np.full((len(indices), longest), self.padding, np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(indices):
            begin, size = int(self.tokens.starts[index]), int(self.sizes[index])
            ids[row, :size], mask[row, :size] = self.tokens.ids[begin : begin + size], 1
        labels = torch.zeros(len(indices), dtype=torch.int64)
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), labels)


class SpacedRows:
    """At most `count` rows of a dataset, at equal distances."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        self.dataset = dataset
        self.places = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round())

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the rows of `indices`."""
        return self.dataset.batch([int(self.places[index]) for index in indices])


class SortedLoader(Loader):
    """A loader that sorts the texts of a step by length, so that its micro batches need little padding."""

    def __init__(self, dataset: ParagraphDataset, batch_size: int, seed: int, micro_batches: int = 1) -> None:
        super().__init__(dataset, batch_size, seed, micro_batches)
        self.sizes = dataset.sizes

    def indices(self, step: int) -> list[int]:
        """Return the rows of a step, longest first."""
        return sorted(super().indices(step), key=lambda index: -int(self.sizes[index]))


def tokenise_paragraphs(
    source: str, tokenizer: PreTrainedTokenizerBase, part: Part, length: int, folder: Path | None = None
) -> ParagraphDataset:
    """Return the distinct prose paragraphs of a source, truncated to `length` tokens, with special tokens.

    Token files are cached like those of `token_files.tokenise`. Raises BadInput for a source that cannot be read.
    """
    largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    about = Metadata(
        kind=f"paragraphs of {length}",
        source=source,
        part=part,
        source_state=text.fingerprint(source),
        tokenizer=fingerprint(tokenizer),
        dtype="uint16" if largest < UINT16_IDS else "uint32",
        eos=int(tokenizer.pad_token_id or 0),
    )
    texts = text.paragraphs(text.open_text(source, PARTS[part]))
    return ParagraphDataset(cached(about, _items(texts, tokenizer, length), folder), about.eos)


def _items(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[TokenizedDocument]:
    while pending := list(islice(texts, TEXTS)):
        yield from _encoded(pending, tokenizer, length)


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[TokenizedDocument]:
    rows = tokenizer(list(texts), truncation=True, max_length=length, verbose=False)["input_ids"]
    for paragraph, ids in zip(texts, rows, strict=True):
        yield TokenizedDocument(ids, len(paragraph.encode()))
