"""Read rows of .json files: an array, values that follow each other, or an object of columns."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilon_compress.data.columns import LONGEST_ROW, opened
from pilon_compress.data.readers.registry import table_format
from pilon_compress.errors import BadInput

CHUNK = 2**20  # characters of JSON that are read at a time
SPACE = re.compile(r"\s*")


@table_format(".json", about="A JSON array of objects, or objects that follow each other.")
def rows(path: Path, column: str | None = None) -> Iterator[Any]:
    """Yield the elements of a JSON array, the objects that follow each other, or the rows of one object of columns.

    An array is read element by element. Raises BadInput, with the row's number.
    """
    with opened(path) as file:
        values = _values(codecs.getreader("utf-8-sig")(file), path)
        first = next(values, None)
        second = next(values, None)
        if second is None and isinstance(first, dict):
            yield from _of_columns(first)
            return
        yield from (row for row in (first, second) if row is not None)
        yield from values


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
        """Return an error that names the row in which the text is not JSON."""
        return BadInput(f"{self.path}, row {self.row}, is not JSON: {reason}")

    def _fill(self) -> None:
        """Read as much text again as is in memory, so that a long value is decoded a few times only."""
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
