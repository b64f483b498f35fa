"""Read rows of .parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilon_compress.data.columns import opened
from pilon_compress.data.readers.registry import table_format
from pilon_compress.errors import BadInput
from pilon_compress.io.errors import first_line

BATCH = 64  # rows in memory at once
BUFFER = 2**20  # bytes read at a time


@table_format(".parquet", about="Tables as written by Arrow, pandas and the hub.")
def rows(path: Path, column: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file; with `column` that column alone, if the file has it. Raises BadInput."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with opened(path) as stream:
        try:
            file = ParquetFile(stream, buffer_size=BUFFER)
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(BATCH, columns=columns):
                yield from batch.to_pylist()
        except (OSError, ValueError, ArrowException) as error:
            raise BadInput(f"{path} cannot be read: {first_line(error)}") from None
