"""Text files: which formats there are, and which files a name stands for."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pilon_compress.data import plain, rows
from pilon_compress.errors import BadInput
from pilon_compress.io import messages

SOURCES = "text sources are hub:..., a txt, jsonl or parquet file, stdlib, stdin"


RowReader = Callable[[Path, str | None], Iterator[Any]]  # (path, column that is needed or None) -> rows

FORMATS: dict[str, RowReader | None] = {  # by suffix in lower case; None: plain text, which has no rows
    ".txt": None,
    ".jsonl": rows.read_lines,
    ".ndjson": rows.read_lines,
    ".json": rows.read_json,
    ".parquet": rows.read_parquet,
}
INSTEAD = {  # what to do with other formats
    **dict.fromkeys((".md", ".rst", ".tex", ".log", ".text", ""), "if it is plain text, copy it to a .txt file"),
    **dict.fromkeys((".html", ".htm", ".xml", ".pdf", ".docx"), "save its text as a .txt file"),
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".arrow"), "save the table as .parquet or .jsonl, for example by pandas"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"), "unpack it first"),
}


def find(name: str) -> tuple[list[Path], str]:
    """Find the files of FILE, FOLDER or GLOB, each with an optional ::COLUMN, in order; the column is text by default.

    A name that exists is taken literally, whatever brackets it holds; a folder stands for its readable files. Raises
    BadInput if there are none, and for a file of another format.
    """
    pattern, column = os.path.expanduser(name), ""
    paths = _paths(pattern)
    if not paths and "::" in pattern:
        pattern, _, column = pattern.rpartition("::")
        paths = _paths(pattern)
    if not paths and os.path.isdir(pattern):
        raise BadInput(f"{pattern} is a folder without {', '.join(FORMATS)} files")
    if not paths:
        kind = "file matches" if any(character in pattern for character in "*?[") else "such file:"
        raise BadInput(f"no {kind} {pattern}; {SOURCES}")
    for path in paths:
        if path.suffix.lower() not in FORMATS:
            advice = INSTEAD.get(path.suffix.lower(), "save its text as one of these")
            raise BadInput(f"{path}: text is read from {', '.join(FORMATS)} files; {advice}")
    return paths, column or "text"


def documents(path: Path, column: str) -> Iterator[str]:
    """Yield the documents of a file. Raises BadInput."""
    read = FORMATS[path.suffix.lower()]
    if read is not None:
        yield from rows.texts(read(path, column), column, str(path))
        return
    try:
        with path.open("rb") as file:
            yield from plain.read(file, str(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def table(path: Path) -> Iterator[Any]:
    """Yield the rows of a file. Raises BadInput for plain text."""
    read = FORMATS[path.suffix.lower()]
    if read is None:
        raise BadInput(f"{path} is text without columns: give a jsonl, json or parquet file")
    return read(path, None)


def _paths(pattern: str) -> list[Path]:
    """The files that `pattern` names; none if there are none."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    if os.path.isdir(pattern):
        files = [path for path in sorted(Path(pattern).iterdir()) if path.is_file() and path.name[:1] != "."]
        readable = [path for path in files if path.suffix.lower() in FORMATS]
        if readable and len(readable) < len(files):
            others = ", ".join(sorted({path.suffix or path.name for path in files} - {p.suffix for p in readable}))
            messages.note(f"{pattern}: {len(files) - len(readable)} of {len(files)} files are left out ({others})")
        return readable
    try:
        return [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    except (OSError, ValueError):  # a name that no file can have
        return []
