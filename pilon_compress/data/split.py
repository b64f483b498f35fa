"""The split of a source into a calibration part and a held-out part that share no document."""

from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b
from typing import Literal

from pilon_compress import progress
from pilon_compress.data.plain import cut
from pilon_compress.errors import BadInput

HELD_OUT = 5  # one document in five is held out
FEW, SMALL = 20, 2**20  # documents, characters: a source with no more of either is split as a whole
LARGEST = 10  # no document of a small source may be more than a tenth of it
SHORTEST = 80  # characters; shorter documents are not cut
FAIR = (0.05, 0.4)  # share of a small source that may be held out, in characters

Part = Literal["all", "calibration", "held-out"]


def belongs(document: str, part: Part) -> bool:
    """Tell if a document is in that part: decided by a hash of its text alone."""
    return part == "all" or (part == "held-out") == (_digest(document) % HELD_OUT == 0)


def split(documents: Iterable[str], part: Part, source: str) -> Iterator[str]:
    """Yield the documents of a part, in order: every document belongs to one, by a hash of its text.

    A source with few documents or little text is read whole first, so that neither part is empty, nor nearly so, by
    luck. Where the hashes hold out less than a twentieth of its text or more than two fifths, documents that are more
    than a tenth of it are cut, and where that does not help, the smallest hashes are held out, up to a fifth.
    Raises BadInput if the part stays empty.
    """
    stream = iter(documents)
    head: list[str] = []
    size = 0
    for document in stream:
        head.append(document)
        size += len(document)
        if len(head) > FEW and size > SMALL:
            break
    else:
        yield from _of_small(head, part, source)
        return
    yield from (document for document in head if belongs(document, part))
    yield from (document for document in stream if belongs(document, part))


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
    """Cut every document that is more than a tenth of them all; the pieces by document."""
    limit = max(SHORTEST, sum(map(len, documents)) // LARGEST)
    pieces = {document: [piece for piece in cut(document, limit) if piece.strip()] for document in documents}
    before, after = len(pieces), sum(map(len, pieces.values()))
    if after > before:
        progress.note(f"{source}: of {before} documents the largest were cut, into {after}, to hold some text back")
    return pieces


def _by_hash(documents: Collection[str]) -> set[str] | None:
    """The documents, all different, that their hashes hold out; None where that is not a fair share of the text."""
    chosen = {document for document in documents if belongs(document, "held-out")}
    share = sum(map(len, chosen)) / max(1, sum(map(len, documents)))
    return chosen if FAIR[0] <= share <= FAIR[1] else None


def _smallest_hashes(documents: Collection[str]) -> set[str]:
    """The documents, all different, to hold out where hashes alone are unfair: up to a fifth, at least one of two."""
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
