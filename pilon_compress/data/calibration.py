"""Make batches of token ids of the calibration text."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput


def encoder_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, batch_size: int
) -> list[Batch]:
    """Return texts as padded batches, longest first, so that padding is short and memory peaks at the start.

    At most `max_length` tokens per text. Raises BadInput for a tokenizer with neither padding nor EOS token.
    """
    if tokenizer.pad_token is None:
        raise BadInput("the tokenizer has neither padding nor EOS token: name a pad_token in tokenizer_config.json")
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


def causal_batches(windows: Sequence[list[int]], batch_size: int) -> list[Batch]:
    """Return windows of equal length (see `data.sequences`) as batches without padding."""
    stacks = [torch.tensor(windows[start : start + batch_size]) for start in range(0, len(windows), batch_size)]
    return [Batch(ids) for ids in stacks]


def tokens(batches: Sequence[Batch]) -> int:
    """Return the number of tokens that are not padding."""
    return int(sum(int(batch.mask.sum()) for batch in batches))


def largest_id(batches: Sequence[Batch]) -> int:
    """Return the largest token id of all batches."""
    return max(int(batch.input_ids.max()) for batch in batches)


def sequences(batches: Sequence[Batch]) -> int:
    """Return the number of texts or windows."""
    return sum(len(batch.input_ids) for batch in batches)


def without(batches: Sequence[Batch], known: Sequence[Batch], count: int) -> list[Batch]:
    """Return batches of at most `count` sequences of `batches`, those that are in `known` left out."""
    seen = {_content(row, mask) for batch in known for row, mask in zip(batch.input_ids, batch.mask, strict=True)}
    found, room = list[Batch](), count
    for batch in batches:
        rows = zip(batch.input_ids, batch.mask, strict=True)
        fresh = torch.tensor([_content(row, mask) not in seen for row, mask in rows]).nonzero()[:room, 0]
        if len(fresh):
            found.append(batch.rows(fresh))
            room -= len(fresh)
    return found


def _content(row: torch.Tensor, mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(row[mask.bool()].tolist())
