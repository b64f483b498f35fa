"""Register readers of text: of a scheme of sources (`hub:...`), or of a file format by its suffixes (`.parquet`).

    @source("stdin", form="stdin", about="Plain text from standard input.", fingerprint=fingerprint)
    def documents(spec): ...                                           yields strings

    @table_format(".jsonl", ".ndjson", about="One JSON value per line.")
    def rows(path, column): ...                                        yields dictionaries (or strings)

    @text_format(".txt", about="Plain UTF-8 text.")
    def documents(path): ...                                           yields strings

A source that cannot be read raises BadInput with one line that begins with the source's name.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilon_compress.data import columns
from pilon_compress.plugins import Registry

PACKAGE = "pilon_compress.data.readers"
Documents = Callable[[str], Iterator[str]]
Rows = Callable[[Path, str | None], Iterator[Any]]  # (path, the needed column or None for all) -> rows


@dataclass(frozen=True)
class Source:
    """A scheme of text sources. Its functions get the complete name of the source (`spec`).

    form: how users write it   about: one sentence
    documents: yields the documents of a source   fingerprint: returns a string that changes when they do
    tables: returns the tables of a source by their names in messages; None where sources have no rows
    column: splits a source of conversations into its table and its column, None where no column is named
    """

    scheme: str
    form: str
    about: str
    documents: Documents
    fingerprint: Callable[[str], str]
    tables: Callable[[str], dict[str, Iterator[Any]]] | None = None
    column: Callable[[str], tuple[str, str | None]] | None = None


@dataclass(frozen=True)
class FileFormat:
    """A format of text files. documents: yields those of a file and a column   rows: None for text without columns"""

    about: str
    documents: Callable[[Path, str], Iterator[str]]
    rows: Rows | None = None


SOURCES: Registry[Source] = Registry("text source", PACKAGE)
FORMATS: Registry[FileFormat] = Registry("file format", PACKAGE)  # by suffix, in lower case


def source(
    scheme: str,
    *,
    form: str,
    about: str,
    fingerprint: Callable[[str], str],
    tables: Callable[[str], dict[str, Iterator[Any]]] | None = None,
    column: Callable[[str], tuple[str, str | None]] | None = None,
) -> Callable[[Documents], Documents]:
    """Register the decorated function as the reader of `scheme` and `scheme:...`; see `Source`."""

    def register(documents: Documents) -> Documents:
        SOURCES.add(scheme, Source(scheme, form, about, documents, fingerprint, tables, column))
        return documents

    return register


def table_format(*suffixes: str, about: str) -> Callable[[Rows], Rows]:
    """Register the decorated function as the reader of table files with these suffixes."""

    def register(rows: Rows) -> Rows:
        def documents(path: Path, column: str) -> Iterator[str]:
            return columns.texts(rows(path, column), column, str(path))

        for suffix in suffixes:
            FORMATS.add(suffix, FileFormat(about, documents, rows))
        return rows

    return register


def text_format(*suffixes: str, about: str) -> Callable[[Callable[[Path], Iterator[str]]], Any]:
    """Register the decorated function as the reader of plain text files with these suffixes."""

    def register(documents: Callable[[Path], Iterator[str]]) -> Callable[[Path], Iterator[str]]:
        for suffix in suffixes:
            FORMATS.add(suffix, FileFormat(about, lambda path, column: documents(path)))
        return documents

    return register


def suffixes() -> str:
    """Return the suffixes of readable files, for messages."""
    return ", ".join(sorted(FORMATS, key=lambda suffix: (FORMATS[suffix].rows is not None, suffix)))


def forms(but: str = "") -> str:
    """Return the forms of sources for messages: files first, then every scheme except `but`."""
    return ", ".join([f"{suffixes()} files", *(one.form for name, one in SOURCES.items() if name != but)])
