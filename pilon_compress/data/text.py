"""Text sources: a hub dataset, files, Python's own documentation, standard input."""

import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any, TypeVar

from pilon_compress.data import files, hub, plain, rows, stdin, stdlib
from pilon_compress.data.paragraphs import paragraphs
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

DEFAULT_LM = "hub:Salesforce/wikitext:wikitext-2-raw-v1:train:text"
EVALUATION_LM = "hub:Salesforce/wikitext:wikitext-2-raw-v1:test:text"
DEFAULT_ENCODER = "stdlib"
POOL = 20  # a sample is drawn from the first POOL * count texts, so that endless sources end
T = TypeVar("T")


def open_text(spec: str, part: Part = "all") -> Iterator[str]:
    """Yield the documents of a source, in a stable order, each of at most `plain.LONGEST` characters.

        hub:REPO:CONFIG:SPLIT:COLUMN      a dataset on the hub, streamed; CONFIG may be empty
        FILE, FOLDER or GLOB [::COLUMN]   .txt, .jsonl, .ndjson, .json, .parquet; COLUMN is text by default
        stdlib[:topics|:docstrings]       Python's language reference, and the docstrings of its standard library
        stdin                             plain text

    Plain text with blank lines holds a document between any two of them, without blank lines one a line. `part`: every
    document belongs to `held-out` (one in five) or to `calibration`, see `split`. Raises BadInput, in one line, for a
    source that cannot be read, or holds no text or none of that part.
    """
    documents = _clean(_documents(spec), spec)
    yield from documents if part == "all" else split(documents, part, spec)


def open_rows(spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a source that is a table, each with the words by which an error names it.

        hub:REPO:CONFIG:SPLIT    a dataset on the hub, streamed; CONFIG may be empty
        FILE, FOLDER or GLOB     .jsonl, .ndjson, .json, .parquet

    Raises BadInput, in one line, for a source that cannot be read.
    """
    if spec.startswith("hub:"):
        fields = spec.split(":")
        if len(fields) != 4 or not all((fields[1], fields[3])):
            raise BadInput(f"{spec}: rows of a hub dataset are hub:REPO:CONFIG:SPLIT; CONFIG may be empty")
        tables = {spec: hub.read(*fields[1:])}
    else:
        tables = {str(path): files.table(path) for path in files.find(spec)[0]}
    for name, table in tables.items():
        for number, row in enumerate(table, 1):
            if not isinstance(row, dict):
                raise BadInput(f"{name}, row {number}, is no object but {type(row).__name__}")
            yield f"{name}, row {number},", row


def fingerprint(spec: str) -> str:
    """Return a string that changes when the text of the source does; cheap: files count by size and time of change.

    A hub dataset counts by its name alone. Raises BadInput for a file that is not there.
    """
    if spec == "stdin":
        state = blake2b(digest_size=16)
        file = stdin.opened()
        while chunk := file.read(plain.LONGEST):
            state.update(chunk)
        return state.hexdigest()
    name = spec.partition(":")[0]
    if name == "stdlib":
        return sys.version
    if name == "hub":
        return spec
    found = [(path, path.stat()) for path in files.find(spec)[0]]
    return "\n".join(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}" for path, state in found)


def sample(texts: Iterable[T], count: int, seed: int, pool: int | None = None) -> list[T]:
    """Draw at most `count` of `texts` without replacement from the first `pool` (default: `POOL` times as many)."""
    found = list(itertools.islice(texts, POOL * count if pool is None else pool))
    return random.Random(seed).sample(found, min(count, len(found)))


def _documents(spec: str) -> Iterator[str]:
    name, _, rest = spec.partition(":")
    if name == "hub":
        return _of_hub(spec)
    if spec == "stdin":
        return plain.read(stdin.opened(), "stdin")
    if name == "stdlib":
        return stdlib.read(rest)
    paths, column = files.find(spec)
    return itertools.chain.from_iterable(files.documents(path, column) for path in paths)


def _of_hub(spec: str) -> Iterator[str]:
    fields = spec.split(":")
    if len(fields) != 5 or not all((fields[1], fields[3], fields[4])):
        raise BadInput(f"{spec}: a hub dataset is hub:REPO:CONFIG:SPLIT:COLUMN, as in {DEFAULT_LM}")
    return rows.texts(hub.read(*fields[1:4]), fields[4], spec)


def _clean(documents: Iterable[str], spec: str) -> Iterator[str]:
    """Leave out blank documents, cut those that are too long, and replace what UTF-8 cannot hold. Raises BadInput."""
    found = False
    for document in documents:
        if not document.strip():
            continue
        found = True
        if not _is_unicode(document):  # half a surrogate pair, which JSON can hold
            document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if len(document) <= plain.LONGEST:
            yield document
            continue
        plain.say_cut(spec)
        yield from plain.cut(document, plain.LONGEST)
    if not found:
        raise BadInput(f"{spec} holds no text")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
