"""Read documents of .txt files."""

from collections.abc import Iterator
from pathlib import Path

from pilon_compress.data import plain
from pilon_compress.data.readers.registry import text_format
from pilon_compress.errors import BadInput


@text_format(".txt", about="UTF-8; documents are the paragraphs between blank lines, or the lines if none is blank.")
def documents(path: Path) -> Iterator[str]:
    """Yield the documents of a file. Raises BadInput."""
    try:
        with path.open("rb") as file:
            yield from plain.read(file, str(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
