"""Read rows of .jsonl and .ndjson files: one JSON value per line."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilon_compress.data.columns import LONGEST_ROW, opened
from pilon_compress.data.readers.registry import table_format
from pilon_compress.errors import BadInput


@table_format(".jsonl", ".ndjson", about="One JSON value per line.")
def rows(path: Path, column: str | None = None) -> Iterator[Any]:
    """Yield the value of every line of a jsonl file that is not blank. Raises BadInput, with the line's number."""
    number = 0
    with opened(path) as file:
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
