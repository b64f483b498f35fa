"""How sequences begin, and token streams made of documents: one definition for every command.

    stream     doc EOS doc EOS doc         documents without special tokens, EOS between them where there is one
    window     PREFIX stream[a:b]          PREFIX is what the tokenizer itself puts before a text (BOS), in every window
    document   PREFIX doc EOS              as training packs them; a window that begins inside one gets PREFIX as well

Some models are lost without their BOS: Gemma 3 270M has a perplexity of 32 behind it and 362 without
(docs/results/real-models.md).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from pilon_compress.errors import BadInput

NOTHING = "nothing"  # in a recipe: no token stands before the text
PROBES = ("a", "the", "0", ".")
DOCUMENTS, CHARACTERS = 256, 1 << 20  # at most this much text goes to the tokenizer at once
LONGEST_TOKEN = 16  # characters per token, to begin with, where only the first tokens of a document are wanted
SLACK = 16  # tokens at the end of a text that was cut short: they might be others if it went on


def prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text: BOS, [CLS], several, or none.

    Raises BadInput where the tokenizer knows no text at all.
    """
    for probe in PROBES:
        plain = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        whole = tokenizer(probe, verbose=False)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return list(whole[:start])
    raise BadInput("the tokenizer gives no tokens for plain text: copy the files of the model it comes from")


def begins_with(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokens at the beginning of every sequence, as text, for reports; None where there are none."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(prefix(tokenizer)))) or None


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield each document and its ids without special tokens of the tokenizer's own, many documents at a time."""
    for batch in _batches(documents):
        rows = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield from zip(batch, rows, strict=True)


def encode_framed(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield each document and its ids with the prefix before and EOS behind, neither twice; no ids for no tokens."""
    # where BOS is EOS, the end of the document before is the beginning already
    before = [token for token in prefix(tokenizer) if token != tokenizer.eos_token_id]
    end = separator(tokenizer)
    for document, row in encode(tokenizer, documents):
        front = before if row[: len(before)] != before else []
        back = end if row[-1:] != end else []
        yield document, front + row + back if row else []


def separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids between two documents: EOS, or nothing."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def windows(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int) -> Iterator[list[int]]:
    """Yield windows of exactly `length` ids, each the prefix and then a stretch of the stream, none overlapping.

    Tokens left over at the end are dropped. Raises BadInput where the prefix leaves no room.
    """
    before, end = prefix(tokenizer), separator(tokenizer)
    room = body_length(length, before)
    buffer: list[int] = []
    for position, (_, row) in enumerate(encode(tokenizer, documents)):
        buffer += (end if position else []) + without(before, row)
        whole = len(buffer) - len(buffer) % room
        yield from (before + buffer[start : start + room] for start in range(0, whole, room))
        buffer = buffer[whole:]


def stream(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], limit: int | None = None
) -> tuple[list[int], float]:
    """Return the stream's first `limit` ids (default: all), and how many UTF-8 bytes of text one of them stands for."""
    before, end = prefix(tokenizer), separator(tokenizer)
    ids: list[int] = []
    size = tokens = 0
    for position, document in enumerate(documents):
        text, row = _beginning(tokenizer, document, None if limit is None else limit - len(ids))
        row = (end if position else []) + without(before, row)
        ids += row
        size, tokens = size + len(text.encode()), tokens + len(row)
        if limit is not None and len(ids) >= limit:
            break
    return (ids if limit is None else ids[:limit]), size / max(1, tokens)


def without(before: list[int], row: list[int]) -> list[int]:
    """`row` without the prefix, where the text of a document spells it out."""
    return row[len(before) :] if before and row[: len(before)] == before else row


def body_length(length: int, before: Sequence[int]) -> int:
    """Return how many ids of the stream fit a window of `length`. Raises BadInput where none does."""
    room = length - len(before)
    if room < 1:
        raise BadInput(f"sequences of {length} tokens are too short: give at least {len(before) + 1}")
    return room


def check_ids(tokenizer: PreTrainedTokenizerBase, largest: int, rows: int) -> None:
    """Raise BadInput where a text has a token id for which the model's embedding, of so many `rows`, has no row."""
    if largest >= rows:
        word = tokenizer.convert_ids_to_tokens(largest)
        raise BadInput(
            f"the tokenizer gives the id {largest} ({word!r}), the model's embedding has {rows} rows: "
            "tokens were added without resize_token_embeddings, or the tokenizer is another model's"
        )


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None) -> tuple[str, list[int]]:
    """At least the first `count` ids of a text, and the text that they were made of: not all of one that is long."""
    size = len(text) if count is None else LONGEST_TOKEN * (count + SLACK)
    while True:
        part = text[:size]
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(part) == len(text) or count is None or len(ids) >= count + SLACK:
            return part, ids
        size *= 4


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of DOCUMENTS, or fewer where they are long."""
    rest = iter(documents)
    while batch := list(islice(rest, 1)):
        size = len(batch[0])
        for document in rest:
            batch.append(document)
            size += len(document)
            if len(batch) == DOCUMENTS or size >= CHARACTERS:
                break
        yield batch
