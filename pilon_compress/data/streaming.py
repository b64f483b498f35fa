"""Cut a text source into blocks while it is read, for sources too large to be tokenised beforehand."""

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
    """Endless blocks of `length` tokens of a source for one rank, tokenised while they are read.

    Every document goes to exactly one of `world` ranks. An epoch yields each block once, drawn at random from a buffer
    of `shuffle` blocks; the last block is padded. `respect_documents` is as in `BlockDataset`.

    `state_dict` and `load_state_dict` continue a run exactly, with the same number of ranks. The documents before that
    place in the epoch are read again, but not tokenised.
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
        """Start at the beginning of epoch 0. Raises BadInput for a tokenizer without EOS."""
        if tokenizer.eos_token_id is None:
            raise BadInput("the tokenizer has no eos_token, which must end every document: name one in its config")
        self.tokenizer = tokenizer
        self.length = length
        self.prefix = [one for one in sequences.prefix(tokenizer) if one != tokenizer.eos_token_id]
        self.stride = sequences.body_length(length, self.prefix)
        self.respect_documents = respect_documents
        self._settings: dict[str, Any] = {  # must be equal where a run continues
            "source": source,
            "part": part,
            "length": length,
            "seed": seed,
            "shuffle": shuffle,
            "rank": rank,
            "world": world,
            "tokenizer": fingerprint(tokenizer),
            "source_state": text.fingerprint(source),
        }
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._read = self._drawn = 0  # documents of this rank; blocks
        self._ended = False
        self._left = _piece([])
        self._buffer: list[Row] = []
        self._documents: Iterator[tuple[str, list[int]]] | None = None

    def batch(self, rows: int) -> Batch:
        """Return the next `rows` blocks. Raises BadInput for a source with fewer documents than ranks."""
        blocks = [self._draw() for _ in range(rows)]
        padding = int(self.tokenizer.eos_token_id or 0)
        return from_rows(blocks, self.length, self.prefix, padding, self.respect_documents)

    def state_dict(self) -> dict[str, Any]:
        """Return settings, place and buffer as plain values and tensors."""
        pieces = [self._left, *self._buffer]
        return {
            **self._settings,
            "epoch": self._epoch,
            "read": self._read,
            "drawn": self._drawn,
            "ended": self._ended,
            "sizes": torch.tensor([len(piece.ids) for piece in pieces]),
            "ids": torch.from_numpy(np.concatenate([piece.ids for piece in pieces])),
            "starts": torch.from_numpy(np.concatenate([piece.starts for piece in pieces])),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the place of `state`. Raises BadInput if it is of another source or other settings."""
        for name, value in self._settings.items():
            if state.get(name) != value:
                change = f"{name} was {state.get(name)!r} and is {value!r}"
                reason = change if name != "source_state" else f"{self._settings['source']} has changed"
                raise BadInput(f"the training text cannot be continued: {reason}")
        self._begin(state["epoch"])
        self._read, self._drawn, self._ended = state["read"], state["drawn"], state["ended"]
        edges = np.cumsum(state["sizes"].numpy())[:-1]
        ids, starts = (np.split(state[name].numpy().copy(), edges) for name in ("ids", "starts"))
        self._left, *self._buffer = (Row(*pair) for pair in zip(ids, starts, strict=True))

    def _draw(self) -> Row:
        while len(self._buffer) < self._settings["shuffle"] and self._advance():
            pass
        if not self._buffer:
            if not self._drawn:
                rank = f"rank {self._settings['rank']} of {self._settings['world']}"
                source = self._settings["source"]
                raise BadInput(f"{source} holds no text for {rank}: give more text, or use fewer processes")
            self._begin(self._epoch + 1)
            return self._draw()
        key = f"{self._settings['seed']}/{self._settings['rank']}/{self._epoch}/{self._drawn}"
        chance = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big")
        place = chance % len(self._buffer)
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        self._drawn += 1
        return self._buffer.pop()

    def _advance(self) -> bool:
        """Cut off the next block, or read a document if none is complete; return False at the end of the epoch."""
        if len(self._left.ids) > self.stride:
            self._buffer.append(_cut(self._left, 0, self.stride + 1))
            self._left = _cut(self._left, self.stride)
            return True
        if self._ended:
            return False
        document = next(self._source(), None)
        if document is None:
            self._ended = True
            if len(self._left.ids) > 1:  # the block before has predicted the first token
                self._buffer.append(self._left)
            self._left = _piece([])
            return False
        self._read += 1
        more = _piece(document[1])
        self._left = Row(np.append(self._left.ids, more.ids), np.append(self._left.starts, more.starts))
        return True

    def _source(self) -> Iterator[tuple[str, list[int]]]:
        """Return this rank's documents and their ids, from the first unread one on."""
        if self._documents is None:
            settings = self._settings
            documents = text.open_text(settings["source"], PARTS[settings["part"]])
            first = settings["rank"] + settings["world"] * self._read
            own = islice(documents, first, None, settings["world"])
            self._documents = sequences.encode_framed(self.tokenizer, own)
        return self._documents


def _cut(row: Row, first: int, last: int | None = None) -> Row:
    return Row(row.ids[first:last], row.starts[first:last])


def _piece(ids: list[int]) -> Row:
    """Return the ids of a document as a piece of the stream that begins there."""
    return Row(np.array(ids, np.int64), np.arange(len(ids)) == 0)
