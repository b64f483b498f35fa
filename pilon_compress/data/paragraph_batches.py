"""Separate texts, for encoders: one paragraph to a row, padded to the longest of its batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pilon_compress.data import text
from pilon_compress.data.batch import Batch
from pilon_compress.data.loader import Loader, Rows
from pilon_compress.data.token_files import PARTS, SMALL, About, Item, Part, TokenFile, cached, fingerprint

TEXTS = 256  # tokenised at once


class Paragraphs:
    """The documents of a token file as separate texts."""

    def __init__(self, tokens: TokenFile, padding: int) -> None:
        self.tokens, self.padding = tokens, padding
        self.sizes: NDArray[np.int64] = np.diff(tokens.starts, append=len(tokens))

    def __len__(self) -> int:
        return len(self.sizes)

    def rows(self, indices: Sequence[int]) -> Batch:
        longest = int(max(self.sizes[index] for index in indices))
        ids = np.full((len(indices), longest), self.padding, np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(indices):
            begin, size = int(self.tokens.starts[index]), int(self.sizes[index])
            ids[row, :size], mask[row, :size] = self.tokens.ids[begin : begin + size], 1
        labels = torch.zeros(len(indices), dtype=torch.int64)
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask), labels)


class Spread:
    """At most `count` rows, at equal distances."""

    def __init__(self, rows: Rows, count: int) -> None:
        self.whole, self.places = rows, np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round())

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, indices: Sequence[int]) -> Batch:
        return self.whole.rows([int(self.places[index]) for index in indices])


class ByLength(Loader):
    """A step's texts are sorted by length: micro batches of texts that are alike hold little padding."""

    def __init__(self, rows: Paragraphs, batch_size: int, seed: int, micro_batches: int = 1) -> None:
        super().__init__(rows, batch_size, seed, micro_batches)
        self.sizes = rows.sizes

    def indices(self, step: int) -> list[int]:
        return sorted(super().indices(step), key=lambda index: -int(self.sizes[index]))


def tokenise_paragraphs(
    source: str, tokenizer: PreTrainedTokenizerBase, part: Part, length: int, folder: Path | None = None
) -> Paragraphs:
    """The distinct paragraphs of prose of a source, cut after `length` tokens, as the tokenizer gives single texts.

    Files are kept and found again as those of `tokens.tokenise`. Raises BadInput for a source that cannot be read.
    """
    largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    about = About(
        kind=f"paragraphs of {length}",
        source=source,
        part=part,
        source_state=text.fingerprint(source),
        tokenizer=fingerprint(tokenizer),
        dtype="uint16" if largest < SMALL else "uint32",
        eos=int(tokenizer.pad_token_id or 0),
    )
    texts = text.paragraphs(text.open_text(source, PARTS[part]))
    return Paragraphs(cached(about, _items(texts, tokenizer, length), folder), about.eos)


def _items(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Item]:
    chosen: list[str] = []
    for paragraph in texts:
        chosen.append(paragraph)
        if len(chosen) == TEXTS:
            yield from _encoded(chosen, tokenizer, length)
            chosen = []
    if chosen:
        yield from _encoded(chosen, tokenizer, length)


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Item]:
    rows = tokenizer(list(texts), truncation=True, max_length=length, verbose=False)["input_ids"]
    for paragraph, ids in zip(texts, rows, strict=True):
        yield Item(ids, len(paragraph.encode()))
