"""Read standard input, several times in one run: for its calibration part, its held-out part, its fingerprint."""

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from typing import IO

from pilon_compress.data import plain
from pilon_compress.data.readers.registry import source
from pilon_compress.errors import BadInput

IN_MEMORY = 2**26  # bytes; longer input goes to a temporary file without a name
CHUNK = 2**20


def fingerprint(spec: str) -> str:
    """Return a hash of all of standard input. Raises BadInput if there is none."""
    state = blake2b(digest_size=16)
    file = opened()
    while chunk := file.read(plain.LONGEST):
        state.update(chunk)
    return state.hexdigest()


@source("stdin", form="stdin", about="Plain text from standard input, as of a .txt file.", fingerprint=fingerprint)
def documents(spec: str) -> Iterator[str]:
    """Yield the documents of standard input. Raises BadInput, also for text after `stdin` in `spec`."""
    if spec != "stdin":
        raise BadInput(f"{spec}: write stdin alone for standard input")
    yield from plain.read(opened(), "stdin")


def opened() -> IO[bytes]:
    """Return standard input from its beginning, independent of other readers. Raises BadInput if there is none."""
    file, start = _kept()
    return io.BufferedReader(_Reader(file, start), CHUNK)


@cache
def _kept() -> tuple[IO[bytes], int]:
    """Return a file with random access that holds standard input, and the position at which the text begins."""
    if sys.stdin is None:
        raise BadInput("there is no standard input to read text from")
    stream: IO[bytes] = sys.stdin.buffer
    if stream.seekable():
        return stream, stream.tell()
    data = stream.read(IN_MEMORY)
    if len(data) < IN_MEMORY:
        return io.BytesIO(data), 0
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (open until the process ends)
    copy.write(data)
    shutil.copyfileobj(stream, copy, CHUNK)
    return copy, 0


class _Reader(io.RawIOBase):
    """A reader with its own position in a file that other readers use too."""

    def __init__(self, file: IO[bytes], start: int) -> None:
        self.file, self.start, self.place = file, start, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only positions from the beginning")
        self.place = self.start + offset
        return offset

    def tell(self) -> int:
        return self.place - self.start

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.file.seek(self.place)
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)
