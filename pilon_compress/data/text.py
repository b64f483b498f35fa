"""Open text sources by name with their registered readers; clean, split and sample them."""

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pilon_compress.data import plain
from pilon_compress.data.memory import MEMORY, in_memory
from pilon_compress.data.paragraphs import paragraphs
from pilon_compress.data.readers.files import FILES
from pilon_compress.data.readers.hub import EXAMPLE
from pilon_compress.data.readers.registry import SOURCES, Source
from pilon_compress.data.split import Part, belongs, split
from pilon_compress.errors import BadInput

__all__ = [
    "DEFAULT_ENCODER",
    "DEFAULT_LM",
    "EVALUATION_LM",
    "Part",
    "belongs",
    "fingerprint",
    "open_rows",
    "open_text",
    "paragraphs",
    "sample",
]

DEFAULT_LM = EXAMPLE
EVALUATION_LM = "hub:Salesforce/wikitext:wikitext-2-raw-v1:test:text"
DEFAULT_ENCODER = "stdlib"
POOL = 20  # a sample is drawn from the first POOL * count texts, so that endless sources terminate
T = TypeVar("T")


def open_text(spec: str, part: Part = "all") -> Iterator[str]:
    """Yield the documents of a source, in a stable order, each of at most `plain.LONGEST` characters.

    `spec` is FILE, FOLDER or GLOB, followed by ::COLUMN for tables, or a scheme that is registered in `data.readers`
    (hub:..., stdlib, stdin). Documents of plain text are the paragraphs between blank lines, or the lines if none is
    blank. `part`: every document belongs to `held-out` (one in five) or to `calibration`, see `split`. Raises BadInput
    for a source that cannot be read, or holds no text in that part.
    """
    documents = _clean(source_of(spec).documents(spec), spec)
    yield from documents if part == "all" else split(documents, part, spec)


def open_rows(spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a source that is a table, each with its name for messages.

    `spec` is that of `open_text` without a column. Raises BadInput for a source that cannot be read.
    """
    tables = source_of(spec).tables
    if tables is None:
        raise BadInput(f"{spec} is text without columns: give a table, such as a .jsonl or .parquet file")
    for name, table in tables(spec).items():
        for number, row in enumerate(table, 1):
            if not isinstance(row, dict):
                raise BadInput(f"{name}, row {number}, must be an object, not {type(row).__name__}")
            yield f"{name}, row {number},", row


def fingerprint(spec: str) -> str:
    """Return a string that changes with the text of the source: size and time of files, name of a hub dataset.

    Raises BadInput for a file that is missing.
    """
    return source_of(spec).fingerprint(spec)


def sample(texts: Iterable[T], count: int, seed: int, pool: int | None = None) -> list[T]:
    """Draw at most `count` of `texts` without replacement from the first `pool` (default: `POOL` times as many)."""
    candidates = list(itertools.islice(texts, POOL * count if pool is None else pool))
    return random.Random(seed).sample(candidates, min(count, len(candidates)))


def source_of(spec: str) -> Source:
    """Return the reader of a source: the one registered for the scheme before its colon, else that of files."""
    return MEMORY if in_memory(spec) else SOURCES.get(spec.partition(":")[0]) or FILES


def _clean(documents: Iterable[str], spec: str) -> Iterator[str]:
    """Skip blank documents, cut long ones, replace lone surrogates. Raises BadInput if no document is left."""
    has_text = False
    for document in documents:
        if not document.strip():
            continue
        has_text = True
        if not _is_unicode(document):  # half a surrogate pair, which JSON can hold
            document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if len(document) <= plain.LONGEST:
            yield document
            continue
        plain.say_cut(spec)
        yield from plain.cut(document, plain.LONGEST)
    if not has_text:
        raise BadInput(f"{spec} holds no text")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
