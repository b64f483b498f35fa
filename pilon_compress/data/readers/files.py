"""Read files, folders and globs: find the files of a name, and their documents or rows."""

import glob
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from pilon_compress.data.readers.registry import FORMATS, Source, forms, suffixes
from pilon_compress.errors import BadInput
from pilon_compress.io import messages

INSTEAD = {  # advice for other formats
    **dict.fromkeys((".md", ".rst", ".tex", ".log", ".text", ""), "if it is plain text, copy it to a .txt file"),
    **dict.fromkeys((".html", ".htm", ".xml", ".pdf", ".docx"), "save its text as a .txt file"),
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".arrow"), "save the table as .parquet or .jsonl, for example by pandas"),
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar"), "unpack it first"),
}


def find(name: str) -> tuple[list[Path], str]:
    """Find the files of FILE, FOLDER or GLOB, each with an optional ::COLUMN, in order; the column is text by default.

    A name that exists is taken literally, including brackets; a folder stands for its readable files. Raises BadInput
    if there are none, and for a file of another format.
    """
    pattern, column = os.path.expanduser(name), ""
    paths = _paths(pattern)
    if not paths and "::" in pattern:
        pattern, _, column = pattern.rpartition("::")
        paths = _paths(pattern)
    if not paths and os.path.isdir(pattern):
        raise BadInput(f"{pattern} is a folder without {suffixes()} files")
    if not paths:
        kind = "file matches" if any(character in pattern for character in "*?[") else "such file:"
        raise BadInput(f"no {kind} {pattern}; text sources are {forms()}")
    for path in paths:
        if path.suffix.lower() not in FORMATS:
            advice = INSTEAD.get(path.suffix.lower(), "save its text as one of these")
            raise BadInput(f"{path}: text is read from {suffixes()} files; {advice}")
    return paths, column or "text"


def documents(spec: str) -> Iterator[str]:
    """Yield the documents of all files that `spec` names. Raises BadInput."""
    paths, column = find(spec)
    return chain.from_iterable(FORMATS[path.suffix.lower()].documents(path, column) for path in paths)


def tables(spec: str) -> dict[str, Iterator[Any]]:
    """Open the files that `spec` names as tables, by path. Raises BadInput for plain text."""
    return {str(path): _rows(path) for path in find(spec)[0]}


def _rows(path: Path) -> Iterator[Any]:
    rows = FORMATS[path.suffix.lower()].rows
    if rows is None:
        columns = ", ".join(suffix for suffix, one in FORMATS.items() if one.rows is not None)
        raise BadInput(f"{path} is text without columns: give a {columns} file")
    return rows(path, None)


def column(spec: str) -> tuple[str, str | None]:
    """Split FILE[::COLUMN] into the files and the column, None where none is named."""
    pattern, _, name = spec.partition("::")
    return pattern, name or None


def fingerprint(spec: str) -> str:
    """Return paths, sizes and times of change of the files that `spec` names. Raises BadInput if there are none."""
    states = [(path, path.stat()) for path in find(spec)[0]]
    return "\n".join(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}" for path, state in states)


def _paths(pattern: str) -> list[Path]:
    """Return the files that `pattern` names; [] if there are none."""
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


FILES = Source(  # for names without a registered scheme
    "",
    "FILE, FOLDER or GLOB[::COLUMN]",
    "Files; the column is text by default.",
    documents,
    fingerprint,
    tables,
    column,
)
