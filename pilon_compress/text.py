"""Where text comes from: a hub dataset, a file, Python's own documentation, standard input."""

import ast
import codecs
import glob
import itertools
import json
import os
import pydoc_data.topics
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TypeVar

from pilon_compress import hub
from pilon_compress.errors import BadInput

DEFAULT_LM = "hub:Salesforce/wikitext:wikitext-2-raw-v1:train:text"
ALTERNATIVES = "give a local txt, jsonl or parquet file, `stdlib`, or `stdin` instead"
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HELD_OUT = 5  # one document in five is kept from calibration
NOT_PROSE = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__")
SHORTEST_DOCSTRING = 200
T = TypeVar("T")
POOL = 20  # a sample is drawn from at most this many times as many texts, so that endless sources end

Part = Literal["all", "calibration", "held-out"]


def open_text(spec: str, part: Part = "all") -> Iterator[str]:
    """The documents of a source, in a stable order.

        hub:REPO:CONFIG:SPLIT:COLUMN    a dataset on the hub, streamed; CONFIG may be empty
        FILE or GLOB [::COLUMN]         .txt (documents between blank lines), .jsonl, .json, .parquet (column `text`)
        stdlib[:topics|:docstrings]     Python's language reference, and the docstrings of its standard library
        stdin                           documents between blank lines

    `part`: every document belongs, by a hash of its text, to `held-out` (one in five) or to `calibration`. Raises
    BadInput, in one line, for a source that cannot be read, or holds no text or none of that part.
    """
    found = given = 0
    for document in _documents(spec):
        if not document.strip():
            continue
        found += 1
        if belongs(document, part):
            given += 1
            yield document
    if not found:
        raise BadInput(f"{spec} holds no text")
    if not given:
        raise BadInput(f"{spec} holds {found} documents, none of which falls to the {part} part: give more text")


def belongs(document: str, part: Part) -> bool:
    """Whether a document is in that part: decided by a hash of its text alone."""
    digest = blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") % HELD_OUT == 0
    return part == "all" or (part == "held-out") == held_out


def open_rows(spec: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a source that is a table, each with the words by which an error names it.

        hub:REPO:CONFIG:SPLIT    a dataset on the hub, streamed; CONFIG may be empty
        FILE or GLOB             .jsonl, .json, .parquet

    Raises BadInput, in one line, for a source that cannot be read.
    """
    if spec.startswith("hub:"):
        fields = spec.split(":")
        if len(fields) != 4 or not all((fields[1], fields[3])):
            raise BadInput(f"{spec}: rows of a hub dataset are hub:REPO:CONFIG:SPLIT; CONFIG may be empty")
        tables = {spec: _hub_rows(spec)}
    else:
        tables = {str(path): _lines(path) if path.suffix == ".jsonl" else _file_rows(path) for path in _paths(spec)}
    for name, table in tables.items():
        for number, row in enumerate(table, 1):
            if not isinstance(row, dict):
                raise BadInput(f"{name}, row {number}, is no object but {type(row).__name__}")
            yield f"{name}, row {number},", row


def _lines(path: Path) -> Iterator[Any]:
    """Line by line: `datasets` refuses rows that have other columns than those before them."""
    number = 0
    try:
        with path.open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield json.loads(line.removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path}, line {number}, is not JSON: {error}") from None


def fingerprint(spec: str) -> str:
    """What tells whether a source still holds the same text: cheap, so files count by size and time of change.

    A hub dataset counts by its name alone. Raises BadInput for a file that is not there.
    """
    if spec == "stdin":
        return blake2b(_standard_input().encode(), digest_size=16).hexdigest()
    name = spec.partition(":")[0]
    if name == "stdlib":
        return sys.version
    if name == "hub":
        return spec
    state = [(path, path.stat()) for path in _paths(spec.partition("::")[0])]
    return "\n".join(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}" for path, found in state)


def paragraphs(documents: Iterable[str], min_chars: int = 80) -> Iterator[str]:
    """The distinct prose paragraphs of `documents`, white space folded: the unit of text for encoders.

    Prose is at least `min_chars` long and four fifths letters and spaces: no tables, code or signatures.
    """
    seen = set()
    for document in documents:
        for block in re.split(r"\n\s*\n", document):
            text = " ".join(block.split())
            plain = sum(c.isalpha() or c == " " for c in text)
            if len(text) >= min_chars and plain >= 0.8 * len(text) and text not in seen:
                seen.add(text)
                yield text


def sample(texts: Iterable[T], count: int, seed: int, pool: int | None = None) -> list[T]:
    """At most `count` of `texts`, drawn without replacement from the first `pool` (default: `POOL` times as many)."""
    found = list(itertools.islice(texts, POOL * count if pool is None else pool))
    return random.Random(seed).sample(found, min(count, len(found)))


def _documents(spec: str) -> Iterator[str]:
    name, _, rest = spec.partition(":")
    if name == "hub":
        return _from_hub(spec)
    if spec == "stdin":
        return _blocks(_standard_input())
    if name == "stdlib":
        sources = {"": _stdlib, "topics": _topics, "docstrings": _docstrings}
        if rest not in sources:
            raise BadInput(f"{spec}: the standard library's text is stdlib, stdlib:topics or stdlib:docstrings")
        return sources[rest]()
    return _from_files(spec)


@cache
def _standard_input() -> str:
    """Read once and kept: one run takes its calibration part and its held-out part from it."""
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _blocks(text: str) -> Iterator[str]:
    return (block for block in re.split(r"\n\s*\n", text) if block.strip())


def _decoded(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{origin} is not UTF-8 text (byte {error.start})") from None


def _from_files(spec: str) -> Iterator[str]:
    pattern, _, column = spec.partition("::")
    return itertools.chain.from_iterable(_file(path, column or "text") for path in _paths(pattern))


def _paths(pattern: str) -> list[Path]:
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
    if not paths:
        kind = "file matches" if any(c in pattern for c in "*?[") else "such file:"
        raise BadInput(f"no {kind} {pattern}; text sources are hub:..., a txt, jsonl or parquet file, stdlib, stdin")
    for path in paths:
        if path.suffix not in FORMATS:
            raise BadInput(f"{path}: text is read from {', '.join(FORMATS)} files")
    return paths


def _file(path: Path, column: str) -> Iterator[str]:
    if path.suffix == ".txt":
        try:
            yield from _blocks(_decoded(path.read_bytes(), str(path)))
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}") from None
        return
    yield from _column(_lines(path) if path.suffix == ".jsonl" else _file_rows(path), column, str(path))


def _file_rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".txt":
        raise BadInput(f"{path} is text without columns: give a jsonl, json or parquet file")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    try:
        yield from load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError, ArrowException, DatasetGenerationError) as error:
        raise BadInput(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _column(rows: Iterable[Any], column: str, origin: str) -> Iterator[str]:
    for row in rows:
        if column not in row:
            raise BadInput(f"{origin} has no column {column!r}; it has {', '.join(map(str, row))}")
        text = row[column]
        if not isinstance(text, str):
            raise BadInput(f"column {column!r} of {origin} holds {type(text).__name__}, not text")
        yield text


def _from_hub(spec: str) -> Iterator[str]:
    fields = spec.split(":")
    if len(fields) != 5 or not all((fields[1], fields[3], fields[4])):
        raise BadInput(f"{spec}: a hub dataset is hub:REPO:CONFIG:SPLIT:COLUMN, as in {DEFAULT_LM}")
    return _column(_hub_rows(spec), fields[4], spec)


def _hub_rows(spec: str) -> Iterator[Any]:
    _, repo, config, split, *_ = spec.split(":")
    offline = hub.offline()
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(repo, config or None, split=split, streaming=not offline)
    except (
        OSError,
        ValueError,
        RuntimeError,
        DatasetsError,
    ) as error:  # RuntimeError: a dataset that needs its own code
        if offline:
            raise BadInput(
                f"{repo} is not cached and the hub is out of reach ({hub.unreachable()}); {ALTERNATIVES}"
            ) from error
        raise BadInput(f"{spec} cannot be read: {str(error).splitlines()[0]}; {ALTERNATIVES}") from error


def _topics() -> Iterator[str]:
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield text


def _docstrings() -> Iterator[str]:
    root = sysconfig.get_path("stdlib")
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - set(NOT_PROSE))
        for name in sorted(names):
            if name.endswith(".py"):
                yield from _docstrings_of(Path(folder, name))


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= SHORTEST_DOCSTRING:
                yield text


def _stdlib() -> Iterator[str]:
    yield from _topics()
    yield from _docstrings()
