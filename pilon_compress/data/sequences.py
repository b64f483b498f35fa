"""Make token streams and sequences of documents, with the beginning that the tokenizer gives a text (BOS).

    stream     doc EOS doc EOS doc         documents without special tokens, EOS between them where there is one
    window     PREFIX stream[a:b]          PREFIX: the ids that the tokenizer puts before a text (BOS), in every window
    document   PREFIX doc EOS              as training packs them; a window that begins inside one gets PREFIX as well

Calibration, training and evaluation all use it. Some models fail without their BOS: Gemma 3 270M has a perplexity of 32
with it and 362 without (docs/results/real-models.md).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from pilon_compress.errors import BadInput

NOTHING = "nothing"  # in a recipe: no token precedes the text
PROBES = ("a", "the", "0", ".")  # texts of which most tokenizers know one
DOCUMENTS, CHARACTERS = 256, 1 << 20  # most that one call of the tokenizer gets
CHARACTERS_PER_TOKEN = 16  # first guess where only the first tokens of a document are needed
SLACK = 16  # last tokens of a truncated text, which may differ from those of the complete text


def prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text: BOS, [CLS], several, or none.

    Raises BadInput where the tokenizer has no ids for any of PROBES.
    """
    for probe in PROBES:
        plain = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        framed = tokenizer(probe, verbose=False)["input_ids"]
        for start in range(len(framed) - len(plain) + 1):
            if plain and framed[start : start + len(plain)] == plain:
                return list(framed[:start])
    raise BadInput("the tokenizer gives no tokens for plain text: copy the files of the model it comes from")


def begins_with(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the prefix of every sequence as text, for reports; None where it is empty."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(prefix(tokenizer)))) or None


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield each document and its ids without special tokens; documents go to the tokenizer in batches."""
    for batch in _batches(documents):
        rows = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield from zip(batch, rows, strict=True)


def encode_framed(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield each document and its ids between prefix and EOS, neither twice; an empty document gets no ids."""
    # where BOS is EOS, the EOS of the document before begins this one
    before = [token for token in prefix(tokenizer) if token != tokenizer.eos_token_id]
    end = separator(tokenizer)
    for document, row in encode(tokenizer, documents):
        front = before if row[: len(before)] != before else []
        back = end if row[-1:] != end else []
        yield document, front + row + back if row else []


def separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids between two documents: [EOS], or [] where the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def windows(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int) -> Iterator[list[int]]:
    """Yield windows of exactly `length` ids: the prefix, then a piece of the stream; pieces do not overlap.

    The last, incomplete piece is dropped. Raises BadInput where `length` is not above that of the prefix.
    """
    before, end = prefix(tokenizer), separator(tokenizer)
    room = body_length(length, before)
    buffer: list[int] = []
    for position, (_, row) in enumerate(encode(tokenizer, documents)):
        buffer += (end if position else []) + without(before, row)
        end_of_pieces = len(buffer) - len(buffer) % room
        yield from (before + buffer[start : start + room] for start in range(0, end_of_pieces, room))
        buffer = buffer[end_of_pieces:]


def stream(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], limit: int | None = None
) -> tuple[list[int], float]:
    """Return the first `limit` ids of the stream (default: all), and the mean UTF-8 bytes of text per id."""
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
    """Return `row` without the prefix `before`, which a document's text may spell out."""
    return row[len(before) :] if before and row[: len(before)] == before else row


def body_length(length: int, before: Sequence[int]) -> int:
    """Return the number of stream ids in a window of `length` after the prefix. Raises BadInput if it is below 1."""
    room = length - len(before)
    if room < 1:
        raise BadInput(f"sequences of {length} tokens are too short: give at least {len(before) + 1}")
    return room


def check_ids(tokenizer: PreTrainedTokenizerBase, largest: int, rows: int) -> None:
    """Raise BadInput if the `largest` token id of a text is not below the number of `rows` of the model's embedding."""
    if largest >= rows:
        word = tokenizer.convert_ids_to_tokens(largest)
        raise BadInput(
            f"the tokenizer gives the id {largest} ({word!r}), but the model's embedding has {rows} rows: "
            "call resize_token_embeddings after adding tokens, or use the model's own tokenizer"
        )


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None) -> tuple[str, list[int]]:
    """Return at least the first `count` ids of a text, and the part of the text that they encode; None: all."""
    size = len(text) if count is None else CHARACTERS_PER_TOKEN * (count + SLACK)
    while True:
        part = text[:size]
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        if len(part) == len(text) or count is None or len(ids) >= count + SLACK:
            return part, ids
        size *= 4


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield documents in lists of at most DOCUMENTS, and about CHARACTERS at most."""
    rest = iter(documents)
    while batch := list(islice(rest, 1)):
        size = len(batch[0])
        for document in rest:
            batch.append(document)
            size += len(document)
            if len(batch) == DOCUMENTS or size >= CHARACTERS:
                break
        yield batch
