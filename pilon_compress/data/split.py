"""The split of a source into a calibration part and a held-out part that share no document."""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Literal

from pilon_compress import progress
from pilon_compress.data.plain import cut
from pilon_compress.errors import BadInput

HELD_OUT = 5  # one document in five is held out
FEW, SMALL = 20, 2**20  # documents, characters: a source with no more of either is split as a whole
LARGEST = 10  # no document of a small source may be more than a tenth of it
SHORTEST = 80  # characters; shorter documents are not cut
FAIR = (0.1, 0.4)  # share of a small source's characters that may be held out

Part = Literal["all", "calibration", "held-out"]


def belongs(document: str, part: Part) -> bool:
    """Tell if a document is in that part: decided by a hash of its text alone."""
    return part == "all" or (part == "held-out") == (_digest(document) % HELD_OUT == 0)


def split(documents: Iterable[str], part: Part, source: str) -> Iterator[str]:
    """Yield the documents of a part, in order: every document belongs to one, by a hash of its text.

    A source with few documents or little text is read whole first, so that neither part is empty, nor nearly so, by
    luck: a document that is more than a tenth of it is cut, and where the hashes hold out less than a tenth of the text
    or more than two fifths, the smallest hashes are held out up to a fifth. Raises BadInput if the part stays empty.
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
    whole = list(dict.fromkeys(documents))
    limit = max(SHORTEST, sum(map(len, whole)) // LARGEST)
    pieces = {document: [piece for piece in cut(document, limit) if piece.strip()] for document in whole}
    distinct = list(dict.fromkeys(piece for document in whole for piece in pieces[document]))
    if len(distinct) > len(whole):
        progress.note(f"{source}: {len(whole)} documents were cut into {len(distinct)} to hold some of them back")
    held_out = _held_out(distinct)
    chosen = [piece for text in documents for piece in pieces[text] if (piece in held_out) == (part == "held-out")]
    if documents and not chosen:
        raise BadInput(
            f"{source} holds {len(documents)} documents, none of which falls to the {part} part: give more text"
        )
    yield from chosen


def _held_out(documents: list[str]) -> set[str]:
    """The documents, all different, to hold out: by their hashes, or the smallest hashes where that is unfair."""
    total = sum(map(len, documents))
    chosen = {document for document in documents if belongs(document, "held-out")}
    if FAIR[0] * total <= sum(map(len, chosen)) <= FAIR[1] * total:
        return chosen
    chosen, size = set(), 0
    for document in sorted(documents, key=_digest)[: len(documents) - 1]:
        if chosen and size + len(document) > total / HELD_OUT:
            break
        chosen.add(document)
        size += len(document)
    return chosen


def _digest(document: str) -> int:
    return int.from_bytes(blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
