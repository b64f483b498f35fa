"""The calibration text as batches of token ids."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask, both (B, T); masked positions are padding."""

    input_ids: Tensor
    attention_mask: Tensor


def encoder_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, batch_size: int
) -> list[Batch]:
    """Texts as padded batches, longest first, so that little is padding and memory peaks at the start."""
    texts = sorted(texts, key=len, reverse=True)
    batches = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        batches.append(Batch(encoded["input_ids"], encoded["attention_mask"]))
    return batches


def causal_blocks(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int) -> Iterator[list[int]]:
    """Documents joined by EOS and cut into blocks of `length` tokens; what is left over at the end is dropped."""
    buffer: list[int] = []
    for document in documents:
        buffer += tokenizer(document, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            buffer.append(tokenizer.eos_token_id)
        whole = len(buffer) - len(buffer) % length
        yield from (buffer[start : start + length] for start in range(0, whole, length))
        buffer = buffer[whole:]


def causal_batches(blocks: Sequence[list[int]], batch_size: int) -> list[Batch]:
    """Blocks of equal length as batches without padding."""
    stacks = [torch.tensor(blocks[start : start + batch_size]) for start in range(0, len(blocks), batch_size)]
    return [Batch(ids, torch.ones_like(ids)) for ids in stacks]


def tokens(batches: Sequence[Batch]) -> int:
    """How many tokens are not padding."""
    return int(sum(int(batch.attention_mask.sum()) for batch in batches))


def sequences(batches: Sequence[Batch]) -> int:
    return sum(len(batch.input_ids) for batch in batches)
