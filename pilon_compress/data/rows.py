"""Rows of table files, and the texts of their columns."""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pilon_compress.errors import BadInput
from pilon_compress.io import messages
from pilon_compress.io.errors import first_line

LONGEST_ROW = 2**26  # bytes of a jsonl line, or characters of a JSON value
CHUNK = 2**20  # characters of JSON that are read at a time
BATCH = 64  # rows of a parquet file that are in memory together
LOOK = 10_000  # rows after which a column that none of them has is taken for missing
SPACE = re.compile(r"\s*")


def read_lines(path: Path, column: str | None = None) -> Iterator[Any]:
    """Yield the value of every line of a jsonl file that is not blank. Raises BadInput, with the line's number."""
    number = 0
    with _opened(path) as file:
        while line := file.readline(LONGEST_ROW + 1):
            number += 1
            if len(line) > LONGEST_ROW:
                raise BadInput(f"{path}, line {number}, is longer than {LONGEST_ROW >> 20} MiB: cut its text into rows")
            if not line.strip():
                continue
            try:
                yield json.loads(line.removeprefix(codecs.BOM_UTF8))
            except RecursionError:
                raise BadInput(f"{path}, line {number}, is nested too deeply to be read") from None
            except ValueError as error:
                raise BadInput(f"{path}, line {number}, is not JSON: {error}") from None


def read_json(path: Path, column: str | None = None) -> Iterator[Any]:
    """Yield the elements of a JSON array, the objects that follow each other, or the rows of one object of columns.

    An array is read element by element. Raises BadInput, with the row's number.
    """
    with _opened(path) as file:
        rows = _values(codecs.getreader("utf-8-sig")(file), path)
        first = next(rows, None)
        second = next(rows, None)
        if second is None and isinstance(first, dict):
            yield from _of_columns(first)
            return
        yield from (row for row in (first, second) if row is not None)
        yield from rows


def read_parquet(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file; with `column` that column alone, if the file has it. Raises BadInput."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with _opened(path) as opened:
        try:
            file = ParquetFile(opened, buffer_size=CHUNK)
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(BATCH, columns=columns):
                yield from batch.to_pylist()
        except (OSError, ValueError, ArrowException) as error:
            raise BadInput(f"{path} cannot be read: {first_line(error)}") from None


def texts(rows: Iterable[Any], column: str, origin: str) -> Iterator[str]:
    """Yield the texts of a column; rows without text (no such column, null, blank) are skipped, and counted on stderr.

    A row may also be a string, which counts as the column `text`. Raises BadInput for another kind of row or value,
    with its number, if no row has the column, and if none has text in it.
    """
    count = skipped = 0
    there = False
    names: dict[str, None] = {}
    try:
        for count, row in enumerate(rows, 1):  # noqa: B007
            if isinstance(row, str) and column == "text":
                row = {"text": row}
            if not isinstance(row, dict):
                raise BadInput(f"{origin}, row {count}, is no object but {type(row).__name__}")
            text = row.get(column)
            if not there:
                there = column in row
                names |= dict.fromkeys(map(str, row))
                if not there and count == LOOK:
                    break
            if text is not None and not isinstance(text, str):
                raise BadInput(f"{origin}, row {count}: column {column!r} holds {type(text).__name__}, not text")
            if text is None or not text.strip():
                skipped += 1
            else:
                yield text
    except GeneratorExit:
        _say_skipped(origin, column, skipped, count)
        raise
    if count and not there:
        raise BadInput(f"{origin} has no column {column!r}; it has {', '.join(names) or 'none'}")
    if count and skipped == count:
        raise BadInput(f"{origin} holds no text in column {column!r}: all of its {count} rows are empty")
    _say_skipped(origin, column, skipped, count)


def _say_skipped(origin: str, column: str, skipped: int, count: int) -> None:
    if skipped:
        messages.note(f"{origin}: {skipped} of {count} rows hold no text in column {column!r} and were skipped")


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def _values(file: Any, path: Path) -> Iterator[Any]:
    """Yield the elements of a top-level array, or the values that follow each other; `file` holds text."""
    buffer = Buffer(file, path)
    array = buffer.peek() == "["
    if array:
        buffer.take()
    while buffer.peek() not in ("", "]" if array else ""):
        yield buffer.value()
        if array and buffer.peek() == ",":
            buffer.take()
            if buffer.peek() != "]":
                continue
            raise buffer.refusal("a value is missing")
        if array and buffer.peek() not in ("]", ""):
            raise buffer.refusal("a comma is missing")
    if array and buffer.peek() != "]":
        raise buffer.refusal("the file ends within the array")


class Buffer:
    """The part of a JSON text that is in memory: at most about `LONGEST_ROW` characters."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.place, self.row = "", 0, 1
        self.ended = False
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            match = SPACE.match(self.text, self.place)
            assert match is not None
            self.place = match.end()
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self._fill()

    def take(self) -> None:
        """Step over the character that `peek` returned."""
        self.place += 1

    def value(self) -> Any:
        """Decode the value that begins here. Raises BadInput, with the row's number."""
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
            except RecursionError:
                raise BadInput(f"{self.path}, row {self.row}, is nested too deeply to be read") from None
            except ValueError as error:
                if self.ended:
                    raise self.refusal(getattr(error, "msg", str(error))) from None
            else:
                if self.ended or end < len(self.text):  # a number may go on
                    self.place = end
                    self.row += 1
                    return value
            if len(self.text) - self.place > LONGEST_ROW:
                reason = f"takes more than {LONGEST_ROW >> 20} MiB, or is not JSON: save the file as jsonl"
                raise BadInput(f"{self.path}, row {self.row}, {reason}")
            self._fill()

    def refusal(self, reason: str) -> BadInput:
        """Make the error that says where the text is not JSON."""
        return BadInput(f"{self.path}, row {self.row}, is not JSON: {reason}")

    def _fill(self) -> None:
        """Read on: as much as is there already, so that a long value is decoded a few times only."""
        rest = self.text[self.place :]
        try:
            more = self.file.read(max(CHUNK, len(rest)))
        except (OSError, UnicodeError) as error:
            raise BadInput(f"{self.path}, row {self.row}, cannot be read: {error}") from None
        self.text, self.place, self.ended = rest + more, 0, not more


def _of_columns(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of {column: [values]} or, as by pandas, {column: {index: value}}; else the object itself."""
    columns = [list(v.values()) if isinstance(v, dict) else v for v in table.values()]
    lists = [column for column in columns if isinstance(column, list)]
    if not lists or len(lists) < len(columns) or len({len(column) for column in lists}) > 1:
        yield table
        return
    for values in zip(*lists, strict=True):
        yield dict(zip(table, values, strict=True))
