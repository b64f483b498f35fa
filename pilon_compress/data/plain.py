"""Read documents of plain text as a stream: memory depends neither on the file's size nor on the longest line."""

import codecs
import io
import itertools
from collections.abc import Iterable, Iterator
from typing import IO

from pilon_compress.errors import BadInput
from pilon_compress.io import messages

LONGEST = 2**20  # characters; a longer document is cut
HEAD = 2**22  # characters that are searched for a blank line
ENDS = ("\n\n", "\n", ". ", "。", " ", "\t", "\u3000")  # after which text is cut, the best first


def read(file: IO[bytes], name: str) -> Iterator[str]:
    """Yield the documents of UTF-8 text; `name` is used in messages. Line ends may be \\n, \\r\\n or \\r.

    If a blank line separates two lines of text within the first `HEAD` characters, documents are the paragraphs between
    blank lines; otherwise every line is a document. Documents of more than `LONGEST` characters are cut, with a
    message. Raises BadInput for bytes that are not UTF-8, and for a file that cannot be read.
    """
    start = file.tell() if file.seekable() else 0
    lines = _lines(file)
    try:
        head, size = [], 0
        for line in lines:
            head.append(line)
            size += len(line)
            if size >= HEAD:
                break
        join = _between_blank_lines if _has_blank_line(head) else _line_by_line
        yield from join(itertools.chain(head, lines), name)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{name} is not UTF-8 text (byte {_invalid_byte(file, start, error.start)}): convert it, for example with "
            f"iconv -f latin1 -t utf-8"
        ) from None
    except OSError as error:
        raise BadInput(f"{name} cannot be read: {error.strerror or error}") from None


def cut(text: str, size: int) -> Iterator[str]:
    """Cut `text` into pieces of at most `size` characters, after a paragraph, a line, a sentence or white space.

    A boundary counts in the second half of a piece; without one, the piece has `size` characters. The joined pieces
    are `text`.
    """
    start = 0
    while len(text) - start > size:
        middle, end = start + size // 2, start + size
        places = ((text.rfind(mark, middle, end), len(mark)) for mark in ENDS)
        place = next((index + length for index, length in places if index >= 0), end)
        yield text[start:place]
        start = place
    yield text[start:]


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Yield lines that end with \\n; a line of more than `LONGEST` characters is several strings."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=None)  # type: ignore[arg-type]
    try:
        while line := text.readline(LONGEST):
            yield line
    finally:
        if not file.closed:
            text.detach()  # the caller closes the file


def _has_blank_line(lines: list[str]) -> bool:
    filled = [bool(line.strip()) for line in lines]
    if not any(filled):
        return False
    first, last = filled.index(True), len(filled) - filled[::-1].index(True)
    return not all(filled[first:last])


def _between_blank_lines(lines: Iterable[str], name: str) -> Iterator[str]:
    document = Pending(name)
    for line in lines:
        if line.strip():
            yield from document.add(line)
        else:
            yield from document.end()
    yield from document.end()


def _line_by_line(lines: Iterable[str], name: str) -> Iterator[str]:
    document = Pending(name)
    for line in lines:
        yield from document.add(line)
        if line.endswith("\n"):
            yield from document.end()
    yield from document.end()


class Pending:
    """A document that is not complete yet, in strings of at most `LONGEST` characters together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.strings: list[str] = []
        self.size = 0

    def add(self, string: str) -> Iterator[str]:
        """Append to the document, and yield pieces of one that exceeds `LONGEST`."""
        self.strings.append(string)
        self.size += len(string)
        if self.size > LONGEST:
            *pieces, rest = cut("".join(self.strings), LONGEST)
            say_cut(self.name)
            yield from pieces
            self.strings, self.size = [rest], len(rest)

    def end(self) -> Iterator[str]:
        """Yield the document, unless it is empty, and begin the next one."""
        text = "".join(self.strings).rstrip("\n")
        self.strings, self.size = [], 0
        if text.strip():
            yield text


def say_cut(name: str) -> None:
    """Report once that documents of `name` are cut."""
    messages.note(f"{name}: documents of more than {LONGEST:,} characters are cut into pieces of at most that size")


def _invalid_byte(file: IO[bytes], start: int, fallback: int) -> int:
    """Return the position of the first byte that is not UTF-8, by reading the file again."""
    if not file.seekable():
        return fallback
    file.seek(start)
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    while chunk := file.read(LONGEST):
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as error:
            return before - pending + error.start
        before += len(chunk)
    return before - len(decoder.getstate()[0])
