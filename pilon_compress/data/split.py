"""Split a text source into a calibration part and a held-out part that share no document."""

from collections.abc import Callable, Collection, Iterable, Iterator
from hashlib import blake2b
from itertools import chain
from typing import Literal, TypeVar

from pilon_compress.data.plain import cut
from pilon_compress.errors import BadInput
from pilon_compress.io import messages

HELD_OUT = 5  # one of so many documents is held out
FEW, SMALL = 20, 2**20  # documents, characters: a source with fewer of either is read completely before its split
LARGEST = 10  # no document of a small source may be more than a tenth of it
SHORTEST = 80  # characters; shorter documents are not cut
FAIR = (0.05, 0.4)  # share of a small source that may be held out, in characters

Part = Literal["all", "calibration", "held-out"]
T = TypeVar("T")


def belongs(document: str, part: Part) -> bool:
    """Return True if a document is in `part`, which a hash of its text decides."""
    return part == "all" or (part == "held-out") == (_digest(document) % HELD_OUT == 0)


def split(documents: Iterable[str], part: Part, source: str) -> Iterator[str]:
    """Yield the documents of `part`, in order; a hash of its text assigns each document to one part.

    A source with few documents or little text is read completely first, so that neither part is nearly empty by chance.
    Where the hashes hold out less than a twentieth of its text or more than two fifths, documents that are more than a
    tenth of it are cut, and where that does not help, the smallest hashes are held out, up to a fifth. Raises BadInput
    if the part is empty; `source` names the text in messages.
    """
    head, rest = _beginning(documents, len)
    if rest is None:
        yield from _of_small(head, part, source)
    else:
        yield from (document for document in chain(head, rest) if belongs(document, part))


def split_items(items: Iterable[T], key: Callable[[T], str], part: Part) -> Iterator[T]:
    """Yield the items of `part`, in order, like `split`; items of equal key stay together, and none is cut."""
    if part == "all":
        yield from items
        return
    head, rest = _beginning(items, lambda item: len(key(item)))
    if rest is None:
        keys = list(dict.fromkeys(key(item) for item in head))
        held_out = _by_hash(keys) or _smallest_hashes(keys)
        yield from (item for item in head if (key(item) in held_out) == (part == "held-out"))
    else:
        yield from (item for item in chain(head, rest) if belongs(key(item), part))


def _beginning(items: Iterable[T], size: Callable[[T], int]) -> tuple[list[T], Iterator[T] | None]:
    """Return the first items, up to FEW items and SMALL characters, and the rest; None where there is no rest."""
    stream = iter(items)
    head: list[T] = []
    total = 0
    for item in stream:
        head.append(item)
        total += size(item)
        if len(head) > FEW and total > SMALL:
            return head, stream
    return head, None


def _of_small(documents: list[str], part: Part, source: str) -> Iterator[str]:
    pieces = {document: [document] for document in documents}
    held_out = _by_hash(pieces)
    if held_out is None:
        pieces = _cut(pieces, source)
        distinct = list(dict.fromkeys(piece for of_one in pieces.values() for piece in of_one))
        held_out = _by_hash(distinct) or _smallest_hashes(distinct)
    chosen = [piece for text in documents for piece in pieces[text] if (piece in held_out) == (part == "held-out")]
    if documents and not chosen:
        raise BadInput(
            f"{source} holds {len(documents)} documents, none of which falls to the {part} part: give more text"
        )
    yield from chosen


def _cut(documents: Iterable[str], source: str) -> dict[str, list[str]]:
    """Cut every document that is more than a tenth of the text; return the pieces by document."""
    limit = max(SHORTEST, sum(map(len, documents)) // LARGEST)
    pieces = {document: [piece for piece in cut(document, limit) if piece.strip()] for document in documents}
    before, after = len(pieces), sum(map(len, pieces.values()))
    if after > before:
        messages.note(f"{source}: of {before} documents the largest were cut, into {after}, to hold some text back")
    return pieces


def _by_hash(documents: Collection[str]) -> set[str] | None:
    """Return the documents, all different, that their hashes hold out; None if their share of the text is not FAIR."""
    chosen = {document for document in documents if belongs(document, "held-out")}
    share = sum(map(len, chosen)) / max(1, sum(map(len, documents)))
    return chosen if FAIR[0] <= share <= FAIR[1] else None


def _smallest_hashes(documents: Collection[str]) -> set[str]:
    """Return the documents, all different, of the smallest hashes: up to a fifth of the text, at least one of two."""
    limit = sum(map(len, documents)) / HELD_OUT
    chosen: set[str] = set()
    size = 0
    for document in sorted(documents, key=_digest)[: len(documents) - 1]:
        size += len(document)
        if chosen and size > limit:
            break
        chosen.add(document)
    return chosen


def _digest(document: str) -> int:
    return int.from_bytes(blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
