"""The text of a run: what it learns from, in order, and the fixed slice that it is judged by."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from pilon_compress.config.training import TrainRecipe
from pilon_compress.data.batch import Batch
from pilon_compress.data.chat import tokenise_chat
from pilon_compress.data.loader import Loader, Rows
from pilon_compress.data.packed_chats import Packed
from pilon_compress.data.paragraph_batches import ByLength, Spread, tokenise_paragraphs
from pilon_compress.data.sequences import begins_with
from pilon_compress.data.streaming import StreamingBlocks
from pilon_compress.data.text import DEFAULT_ENCODER, DEFAULT_LM
from pilon_compress.data.token_files import Part, TokenFile, tokenise
from pilon_compress.data.windows import Blocks
from pilon_compress.errors import BadInput


class Streamed:
    """`StreamingBlocks` where a `Loader` is expected: batches must be asked for in order, by one rank."""

    def __init__(self, blocks: StreamingBlocks, batch_size: int, micro_batches: int) -> None:
        self.blocks, self.batch_size, self.micro_batches = blocks, batch_size, micro_batches

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> Batch:
        shares = self.micro_batches * world
        share = micro * world + rank
        return self.blocks.batch((share + 1) * self.batch_size // shares - share * self.batch_size // shares)

    def save(self, path: Path) -> None:
        """Where in the stream this rank is, as a safetensors file with plain values in its header."""
        state = self.blocks.state_dict()
        tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
        plain = {name: value for name, value in state.items() if name not in tensors}
        save_file(tensors, path, metadata={"plain": json.dumps(plain)})

    def load(self, path: Path) -> None:
        """Go on from there. Raises BadInput for another stream, or another number of processes."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                plain = json.loads(file.metadata()["plain"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadInput(f"{path} is missing or corrupt: a streamed run goes on with as many processes") from error
        self.blocks.load_state_dict(plain | tensors)


class Slice:
    """The first `count` rows."""

    def __init__(self, rows: Rows, count: int) -> None:
        self.whole, self.count = rows, min(count, len(rows))

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Sequence[int]) -> Batch:
        return self.whole.rows(indices)


@dataclass(frozen=True)
class Corpus:
    """`tokens` of one pass over the text; None where nobody knows. `per_row`: tokens of a row, on average, where it is
    not the sequence length. `ends`: tokens that end an assistant's turn. `largest`: the largest token id, or of a
    streamed source the largest that the tokenizer has. `begins_with`: tokens before every sequence, as text."""

    batches: Loader | Streamed
    validation: Rows
    tokens: int | None
    per_row: float | None = None
    ends: tuple[int, ...] = ()
    largest: int = 0
    begins_with: str | None = None

    def first(self) -> Batch:
        """Some text to learn from, of which nothing is used up."""
        if not isinstance(self.batches, Streamed):
            return self.batches.batch(0)
        place = self.batches.blocks.state_dict()
        batch = self.batches.batch(0)
        self.batches.blocks.load_state_dict(place)
        return batch


def source_of(recipe: TrainRecipe) -> str:
    """The text source. Raises BadInput where a task has no default."""
    if recipe.data.source is None and recipe.task == "sft":
        raise BadInput("name the conversations to learn from: --data chats.jsonl, with a column of messages")
    return recipe.data.source or DEFAULT_LM


def open_corpus(
    recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, micro_batches: int, rank: int = 0, world: int = 1
) -> Corpus:
    """Tokenise what is not tokenised yet, and cut it into sequences. Raises BadInput for text that cannot be used."""
    asked, source = recipe.data, source_of(recipe)
    part: Part = "train" if asked.validation is None else "all"
    batch, length = recipe.run.batch_size, asked.sequence_length
    held: tuple[str, Part] = (asked.validation or source, "validation" if asked.validation is None else "all")
    if recipe.task == "sft":
        if asked.streaming:
            raise BadInput("data.streaming is for plain text: conversations are packed, which needs all of them")
        chats = tokenise_chat(source, tokenizer, part)
        chosen = tokenise_chat(held[0], tokenizer, held[1])
        judged: Rows = Packed(chosen, length)
        loader = Loader(Packed(chats, length), batch, recipe.seed, micro_batches)
        largest = max(chats.about.largest, chosen.about.largest)
        return Corpus(loader, Slice(judged, asked.validation_sequences), len(chats), None, turn_ends(chats), largest)
    text_held = tokenise(held[0], tokenizer, held[1])
    judged = Blocks(text_held, length, asked.respect_documents)
    validation = Slice(judged, asked.validation_sequences)
    begins = begins_with(tokenizer)
    if asked.streaming:
        blocks = StreamingBlocks(
            source, tokenizer, length, recipe.seed, part, rank, world, respect_documents=asked.respect_documents
        )
        most = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
        return Corpus(Streamed(blocks, batch, micro_batches), validation, None, largest=most, begins_with=begins)
    file: TokenFile = tokenise(source, tokenizer, part)
    rows = Blocks(file, length, asked.respect_documents)
    largest = max(file.about.largest, text_held.about.largest)
    loader = Loader(rows, batch, recipe.seed, micro_batches)
    return Corpus(loader, validation, len(file), largest=largest, begins_with=begins)


def open_paragraphs(
    recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, micro_batches: int, longest: int | None
) -> Corpus:
    """Separate paragraphs, for an encoder that takes at most `longest` tokens. Raises BadInput as `open_corpus`."""
    asked, source = recipe.data, recipe.data.source or DEFAULT_ENCODER
    if asked.streaming:
        raise BadInput("data.streaming is for causal models: an encoder's paragraphs are stored")
    length = min(asked.sequence_length, longest or asked.sequence_length)
    part: Part = "train" if asked.validation is None else "all"
    held: tuple[str, Part] = (asked.validation or source, "validation" if asked.validation is None else "all")
    judged = tokenise_paragraphs(held[0], tokenizer, held[1], length)
    rows = tokenise_paragraphs(source, tokenizer, part, length)
    return Corpus(
        ByLength(rows, recipe.run.batch_size, recipe.seed, micro_batches),
        Spread(judged, asked.validation_sequences),
        len(rows.tokens),
        len(rows.tokens) / len(rows),
        largest=max(rows.tokens.about.largest, judged.tokens.about.largest),
    )


def turn_ends(chats: TokenFile) -> tuple[int, ...]:
    """The tokens at which generation must stop: the last one of every answer."""
    assert chats.scored is not None
    last = chats.scored & ~np.append(chats.scored[1:], False)
    last[chats.starts[1:] - 1] |= chats.scored[chats.starts[1:] - 1]
    return tuple(int(token) for token in np.unique(chats.ids[last]))
