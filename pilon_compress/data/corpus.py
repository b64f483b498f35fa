"""Open the text of a training run: batches in order, and a fixed part for validation."""

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
from pilon_compress.data.block_dataset import BlockDataset
from pilon_compress.data.chat import tokenise_chat
from pilon_compress.data.loader import Dataset, Loader
from pilon_compress.data.packed_dataset import PackedDataset
from pilon_compress.data.paragraph_dataset import SortedLoader, SpacedRows, tokenise_paragraphs
from pilon_compress.data.sequences import begins_with
from pilon_compress.data.streaming import StreamingBlocks
from pilon_compress.data.text import DEFAULT_ENCODER, DEFAULT_LM
from pilon_compress.data.token_files import Part, TokenFile, tokenise
from pilon_compress.errors import BadInput


class Streamed:
    """A `StreamingBlocks` with the interface of `Loader`. Batches must be read in order, by one rank."""

    def __init__(self, blocks: StreamingBlocks, batch_size: int, micro_batches: int) -> None:
        self.blocks, self.batch_size, self.micro_batches = blocks, batch_size, micro_batches

    def batch(self, step: int, micro: int = 0, rank: int = 0, world: int = 1) -> Batch:
        """Return the next blocks, one rank's share of one micro batch; `step` is not used."""
        shares = self.micro_batches * world
        share = micro * world + rank
        return self.blocks.batch((share + 1) * self.batch_size // shares - share * self.batch_size // shares)

    def save(self, path: Path) -> None:
        """Write this rank's place in the stream to a safetensors file; its header holds the plain values."""
        state = self.blocks.state_dict()
        tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
        plain = {name: value for name, value in state.items() if name not in tensors}
        save_file(tensors, path, metadata={"plain": json.dumps(plain)})

    def load(self, path: Path) -> None:
        """Continue at the place in a file of `save`. Raises BadInput for another stream or number of processes."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                plain = json.loads(file.metadata()["plain"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadInput(f"{path} is missing or corrupt: resume with the same number of processes") from error
        self.blocks.load_state_dict(plain | tensors)


class FirstRows:
    """The first `count` rows of a dataset."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        self.dataset, self.count = dataset, min(count, len(dataset))

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the rows of `indices`."""
        return self.dataset.batch(indices)


@dataclass(frozen=True)
class Corpus:
    """Training batches and validation rows of a run.

    tokens       of one pass over the text; None for a streamed source
    per_row      mean tokens of a row; None where that is the sequence length
    ends         tokens that end an assistant's turn
    largest      the largest token id; for a streamed source the largest of the tokenizer
    begins_with  prefix of every sequence, as text
    """

    batches: Loader | Streamed
    validation: Dataset
    tokens: int | None
    per_row: float | None = None
    ends: tuple[int, ...] = ()
    largest: int = 0
    begins_with: str | None = None

    def first(self) -> Batch:
        """Return the next batch without moving the place in a stream."""
        if not isinstance(self.batches, Streamed):
            return self.batches.batch(0)
        place = self.batches.blocks.state_dict()
        batch = self.batches.batch(0)
        self.batches.blocks.load_state_dict(place)
        return batch


def source_of(recipe: TrainRecipe) -> str:
    """Return the text source of a recipe. Raises BadInput where the task has no default."""
    if recipe.data.source is None and recipe.task == "sft":
        raise BadInput("name the conversations to learn from: --data chats.jsonl, with a column of messages")
    return recipe.data.source or DEFAULT_LM


def open_corpus(
    recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, micro_batches: int, rank: int = 0, world: int = 1
) -> Corpus:
    """Return the corpus of a causal model; text that is not in the cache is tokenised now.

    Raises BadInput for text that cannot be read, and for recipes whose settings exclude each other.
    """
    if recipe.task == "sft":
        return _open_conversations(recipe, tokenizer, micro_batches)
    data, source = recipe.data, source_of(recipe)
    part, (validation_source, validation_part) = _parts(recipe, source)
    batch_size, length = recipe.run.batch_size, data.sequence_length
    validation_tokens = tokenise(validation_source, tokenizer, validation_part)
    validation = FirstRows(BlockDataset(validation_tokens, length, data.respect_documents), data.validation_sequences)
    begins = begins_with(tokenizer)
    if data.streaming:
        blocks = StreamingBlocks(
            source, tokenizer, length, recipe.seed, part, rank, world, respect_documents=data.respect_documents
        )
        largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
        batches = Streamed(blocks, batch_size, micro_batches)
        return Corpus(batches, validation, None, largest=largest, begins_with=begins)
    tokens = tokenise(source, tokenizer, part)
    loader = Loader(BlockDataset(tokens, length, data.respect_documents), batch_size, recipe.seed, micro_batches)
    largest = max(tokens.about.largest, validation_tokens.about.largest)
    return Corpus(loader, validation, len(tokens), largest=largest, begins_with=begins)


def _open_conversations(recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, micro_batches: int) -> Corpus:
    """Return the corpus of conversations in packed blocks. Raises BadInput like `open_corpus`."""
    data, source = recipe.data, source_of(recipe)
    if data.streaming:
        raise BadInput("data.streaming is for plain text: leave it out for conversations, which are packed")
    part, (validation_source, validation_part) = _parts(recipe, source)
    chats = tokenise_chat(source, tokenizer, part)
    validation_chats = tokenise_chat(validation_source, tokenizer, validation_part)
    validation = FirstRows(PackedDataset(validation_chats, data.sequence_length), data.validation_sequences)
    loader = Loader(PackedDataset(chats, data.sequence_length), recipe.run.batch_size, recipe.seed, micro_batches)
    largest = max(chats.about.largest, validation_chats.about.largest)
    return Corpus(loader, validation, len(chats), ends=turn_ends(chats), largest=largest)


def _parts(recipe: TrainRecipe, source: str) -> tuple[Part, tuple[str, Part]]:
    """Return the part of `source` to learn from, and the source and part for validation."""
    if recipe.data.validation is None:
        return "train", (source, "validation")
    return "all", (recipe.data.validation, "all")


def open_paragraphs(
    recipe: TrainRecipe, tokenizer: PreTrainedTokenizerBase, micro_batches: int, longest: int | None
) -> Corpus:
    """Return a corpus of separate paragraphs for an encoder that takes at most `longest` tokens (None: no limit).

    Raises BadInput like `open_corpus`.
    """
    data, source = recipe.data, recipe.data.source or DEFAULT_ENCODER
    if data.streaming:
        raise BadInput("data.streaming is for causal models: leave it out for an encoder, whose paragraphs are stored")
    length = min(data.sequence_length, longest or data.sequence_length)
    part, (validation_source, validation_part) = _parts(recipe, source)
    validation_rows = tokenise_paragraphs(validation_source, tokenizer, validation_part, length)
    rows = tokenise_paragraphs(source, tokenizer, part, length)
    return Corpus(
        SortedLoader(rows, recipe.run.batch_size, recipe.seed, micro_batches),
        SpacedRows(validation_rows, data.validation_sequences),
        len(rows.tokens),
        len(rows.tokens) / len(rows),
        largest=max(rows.tokens.about.largest, validation_rows.tokens.about.largest),
    )


def turn_ends(chats: TokenFile) -> tuple[int, ...]:
    """Return the distinct last tokens of the answers in `chats`, at which generation must stop."""
    assert chats.scored is not None
    last = chats.scored & ~np.append(chats.scored[1:], False)
    last[chats.starts[1:] - 1] |= chats.scored[chats.starts[1:] - 1]
    return tuple(int(token) for token in np.unique(chats.ids[last]))
