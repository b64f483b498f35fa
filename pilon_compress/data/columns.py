"""Read the texts in a column of a table."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pilon_compress.errors import BadInput
from pilon_compress.io import messages

LONGEST_ROW = 2**26  # bytes of a jsonl line, or characters of a JSON value; longer ones are refused
ROWS_WITHOUT_COLUMN = 10_000  # rows without the column after which it counts as missing


def texts(rows: Iterable[Any], column: str, origin: str) -> Iterator[str]:
    """Yield the texts of a column; rows without text (no such column, null, blank) are skipped, with a message.

    A row may also be a string, which counts as the column `text`. Raises BadInput for another kind of row or value,
    with its number, if no row has the column, and if none has text in it; `origin` names the table in messages.
    """
    count = skipped = 0
    has_column = False
    names: dict[str, None] = {}
    try:
        for count, row in enumerate(rows, 1):  # noqa: B007
            if isinstance(row, str) and column == "text":
                row = {"text": row}
            if not isinstance(row, dict):
                raise BadInput(f"{origin}, row {count}, must be an object, not {type(row).__name__}")
            text = row.get(column)
            if not has_column:
                has_column = column in row
                names |= dict.fromkeys(map(str, row))
                if not has_column and count == ROWS_WITHOUT_COLUMN:
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
    if count and not has_column:
        raise BadInput(f"{origin} has no column {column!r}; it has {', '.join(names) or 'none'}")
    if count and skipped == count:
        raise BadInput(f"{origin} holds no text in column {column!r}: all of its {count} rows are empty")
    _say_skipped(origin, column, skipped, count)


def _say_skipped(origin: str, column: str, skipped: int, count: int) -> None:
    if skipped:
        messages.note(f"{origin}: {skipped} of {count} rows hold no text in column {column!r} and were skipped")


def opened(path: Path) -> IO[bytes]:
    """Open a file for reading bytes. Raises BadInput if that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
