"""Blocks of a source that is too large to be tokenised beforehand."""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pilon_compress.data import sequences, text
from pilon_compress.data.batch import Batch, Row, from_rows
from pilon_compress.data.token_files import PARTS, Part, fingerprint
from pilon_compress.errors import BadInput


class StreamingBlocks:
    """One rank's blocks of `length` tokens of a source, tokenised as they are read, in epochs without end.

    Every document goes to exactly one of `world` ranks, and each epoch gives all its blocks once, drawn at random from
    `shuffle` of them at a time; the last one is padded. `respect_documents` is as in `Blocks`.

    `state_dict` makes a run go on exactly. The documents read until then in the epoch are read again, though not
    tokenised; the number of ranks must stay. Raises BadInput for a source with fewer documents than ranks.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        seed: int,
        part: Part = "train",
        rank: int = 0,
        world: int = 1,
        shuffle: int = 1024,
        respect_documents: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise BadInput("the tokenizer has no eos_token, which must end every document: name one in its config")
        self.tokenizer = tokenizer
        self.length = length
        self.prefix = [one for one in sequences.prefix(tokenizer) if one != tokenizer.eos_token_id]
        self.stride = sequences.body_length(length, self.prefix)
        self.respect_documents = respect_documents
        self._made: dict[str, Any] = {
            "source": source,
            "part": part,
            "length": length,
            "seed": seed,
            "shuffle": shuffle,
        }
        self._made |= {"rank": rank, "world": world, "tokenizer": fingerprint(tokenizer)}
        self._made |= {"source_state": text.fingerprint(source)}
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._read = self._drawn = 0  # documents of this rank, blocks
        self._ended = False
        self._left = _piece([])
        self._buffer: list[Row] = []
        self._documents: Iterator[tuple[str, list[int]]] | None = None

    def batch(self, rows: int) -> Batch:
        """The next `rows` blocks."""
        blocks = [self._draw() for _ in range(rows)]
        padding = int(self.tokenizer.eos_token_id or 0)
        return from_rows(blocks, self.length, self.prefix, padding, self.respect_documents)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        pieces = [self._left, *self._buffer]
        return {
            **self._made,
            "epoch": self._epoch,
            "read": self._read,
            "drawn": self._drawn,
            "ended": self._ended,
            "sizes": torch.tensor([len(piece.ids) for piece in pieces]),
            "ids": torch.from_numpy(np.concatenate([piece.ids for piece in pieces])),
            "starts": torch.from_numpy(np.concatenate([piece.starts for piece in pieces])),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises BadInput if this stream reads anything else, or otherwise."""
        for name, value in self._made.items():
            if state.get(name) != value:
                change = f"{name} was {state.get(name)!r} and is {value!r}"
                what = change if name != "source_state" else f"{self._made['source']} has changed"
                raise BadInput(f"the training text cannot go on: {what}")
        self._begin(state["epoch"])
        self._read, self._drawn, self._ended = state["read"], state["drawn"], state["ended"]
        edges = np.cumsum(state["sizes"].numpy())[:-1]
        ids, starts = (np.split(state[name].numpy().copy(), edges) for name in ("ids", "starts"))
        self._left, *self._buffer = (Row(*pair) for pair in zip(ids, starts, strict=True))

    def _draw(self) -> Row:
        while len(self._buffer) < self._made["shuffle"] and self._advance():
            pass
        if not self._buffer:
            if not self._drawn:
                which = f"rank {self._made['rank']} of {self._made['world']}"
                raise BadInput(f"{self._made['source']} holds no text for {which}: give more text, or take fewer ranks")
            self._begin(self._epoch + 1)
            return self._draw()
        key = f"{self._made['seed']}/{self._made['rank']}/{self._epoch}/{self._drawn}"
        chance = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
        place = chance % len(self._buffer)
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        self._drawn += 1
        return self._buffer.pop()

    def _advance(self) -> bool:
        """Cut a block off, or read a document, whichever is next; False at the end of the epoch."""
        if len(self._left.ids) > self.stride:
            self._buffer.append(_cut(self._left, 0, self.stride + 1))
            self._left = _cut(self._left, self.stride)
            return True
        if self._ended:
            return False
        found = next(self._source(), None)
        if found is None:
            self._ended = True
            if len(self._left.ids) > 1:  # one token is what the block before it has predicted
                self._buffer.append(self._left)
            self._left = _piece([])
            return False
        self._read += 1
        more = _piece(found[1])
        self._left = Row(np.append(self._left.ids, more.ids), np.append(self._left.starts, more.starts))
        return True

    def _source(self) -> Iterator[tuple[str, list[int]]]:
        """This rank's documents from the first one on that has not been read."""
        if self._documents is None:
            made = self._made
            documents = text.open_text(made["source"], PARTS[made["part"]])
            mine = islice(documents, made["rank"] + made["world"] * self._read, None, made["world"])
            self._documents = sequences.encode_framed(self.tokenizer, mine)
        return self._documents


def _cut(row: Row, first: int, last: int | None = None) -> Row:
    return Row(row.ids[first:last], row.starts[first:last])


def _piece(ids: list[int]) -> Row:
    """A document."""
    return Row(np.array(ids, np.int64), np.arange(len(ids)) == 0)
