"""Cut documents into prose paragraphs, the texts of encoders."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from unicodedata import category

from pilon_compress.data.plain import cut
from pilon_compress.io import messages

LONGEST = 2**12  # characters; a longer paragraph is cut
ENOUGH = 32  # paragraphs; fewer are cut into more, or joined by short ones
SHORTEST_PIECE = 200  # characters to which the paragraphs of a small text are cut
SCARCE = 4  # short paragraphs are used where there are so many times as many of them
POOL = 2**15  # short paragraphs that are held back until it is known whether they are needed


def paragraphs(documents: Iterable[str], min_chars: int = 80) -> Iterator[str]:
    """Yield the distinct prose paragraphs of `documents`, white space folded, cut after `LONGEST` characters.

    Prose is at least `min_chars` long and four fifths letters and spaces, which excludes tables, code and signatures.
    Where nearly all text is in shorter paragraphs (one sentence per line), these are included. Where there is no prose,
    any paragraph is. Fewer than `ENOUGH` paragraphs are cut into shorter ones. A message reports each of these.
    """
    seen: set[int] = set()
    short: list[str] = []
    other: list[str] = []
    full = 0
    for block in _enough(_blocks(documents)):
        if (key := hash(block)) in seen:
            continue
        seen.add(key)
        if not _is_prose(block):
            if not full and len(other) < POOL:
                other.append(block)
        elif len(block) >= min_chars:
            full += 1
            yield block
        elif full < ENOUGH:
            short.append(block)
            if len(short) >= POOL:
                _say_short(min_chars, full)
                yield from short
                short.clear()
        if full >= ENOUGH:
            short.clear()
            other.clear()
    if full < ENOUGH and len(short) > SCARCE * full:
        _say_short(min_chars, full)
        yield from short
    elif not full and other:
        messages.note("paragraphs that are not prose are taken: the text has no others")
        yield from other


def _say_short(min_chars: int, full: int) -> None:
    longer = f"only {full} are longer" if full else "none is longer"
    messages.note(f"paragraphs of fewer than {min_chars} characters are taken, too: {longer}")


def _blocks(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for block in re.split(r"\n\s*\n", document):
            for piece in cut(" ".join(block.split()), LONGEST):
                if piece := piece.strip():
                    yield piece


def _enough(blocks: Iterator[str]) -> Iterator[str]:
    """Yield the blocks; fewer than `ENOUGH` are cut into shorter ones of at least `SHORTEST_PIECE` characters."""
    head = list(islice(blocks, ENOUGH))
    limit = LONGEST if len(head) == ENOUGH else max(SHORTEST_PIECE, sum(map(len, head)) // (2 * ENOUGH))
    pieces = [piece.strip() for block in head for piece in cut(block, limit)]
    if len(pieces) > len(head):
        messages.note(f"the text has only {len(head)} paragraphs: they were cut into {len(pieces)}")
    yield from pieces
    yield from blocks


def _is_prose(text: str) -> bool:
    plain = sum(c.isalpha() or c == " " for c in text)
    if plain < 0.8 * len(text):
        plain += sum(category(c)[0] == "M" for c in text)  # vowel signs of Thai, Hindi and others
    return plain >= 0.8 * len(text)
