"""Results on stdout: tables and sentences that fit the width of the terminal, or one JSON object."""

import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

PIPE_WIDTH = 120  # a pipe has no width: tables there are not cut short
GAP = 2
TEXT = 24  # cells with spaces that are longer are sentences, which wrap
SHORTEST = 8  # letters of a name that stay at least


def wait_passively() -> None:
    """Let OpenMP threads sleep while they wait, unless the user says otherwise. To be called before torch is imported.

    By default they spin, which on cores that others use makes small decompositions seven times as slow
    (docs/results/real-models.md). Benchmarks of kernels need the spinning, so they do not call this.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def command_line() -> str:
    """Return the command that runs, as a shell takes it: results keep it."""
    return shlex.join(["pilon-compress", *sys.argv[1:]])


def print_json(result: dict[str, Any]) -> None:
    """Print `result` as one JSON object, and nothing else."""
    print(json.dumps(result, indent=2))


def terminal_width() -> int | None:
    """Return the columns of the terminal behind stdout; None for a pipe or a file."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else None


def say(text: str) -> None:
    """Print sentences; in a terminal they wrap at spaces."""
    width = terminal_width()
    print(text if width is None else "\n".join(_wrapped(line, width) for line in text.split("\n")), flush=True)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    totals: Sequence[Sequence[str]] = (),
    optional: Sequence[str] = (),
) -> None:
    """Print a table: the first column is text, the others are right-aligned figures; `totals` end it.

    Empty columns are left out. Headings wrap at spaces. Where the terminal is too narrow the `optional` columns go, in
    that order, then others from the right, and a line says which.
    """
    every = [*rows, *totals]
    used = [index for index in range(len(columns)) if any(row[index] for row in every)]
    width = terminal_width()
    shown = used if width is None else _fitting(columns, every, used, optional, width)
    widths = _widths(columns, every, shown, width)
    name = title if width is None else _wrapped(title, width)
    print(f"\033[1m{name}\033[0m" if width is not None and "NO_COLOR" not in os.environ else name)
    print()
    rule = "─" * (sum(widths) + GAP * (len(widths) - 1))
    for line in _lines([columns[index] for index in shown], widths, _prose(every, shown), bottom=True):
        print(line)
    print(rule)
    for place, row in enumerate(every):
        if totals and rows and place == len(rows):
            print(rule)
        for line in _lines([row[index] for index in shown], widths, _prose(every, shown)):
            print(line)
    if lost := [columns[index] for index in used if index not in shown]:
        say(f"No room for: {', '.join(lost)}.")
    print()


def _fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], used: list[int], optional: Sequence[str], width: int
) -> list[int]:
    """Return the columns that stay, so that their least widths fit into `width`."""
    going = [columns.index(name) for name in optional if columns.index(name) in used]
    going += [index for index in reversed(used[1:]) if index not in going]
    shown = list(used)
    for index in going:
        least = [_least(columns, rows, one, place == 0) for place, one in enumerate(shown)]
        if sum(least) + GAP * (len(shown) - 1) <= width or len(shown) <= 2:
            break
        shown.remove(index)
    return shown


def _least(columns: Sequence[str], rows: Sequence[Sequence[str]], index: int, name: bool) -> int:
    """Return the least width of a column: that of its figures, or of its longest word where it wraps."""
    cells = [row[index] for row in rows]
    heading = max(map(len, columns[index].split()), default=0)
    if not name and _is_prose(cells):
        return max(heading, *(len(word) for cell in cells for word in cell.split()))
    longest = max(map(len, cells), default=0)
    return max(heading, min(longest, 3 * SHORTEST) if name else longest)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], shown: list[int], width: int | None) -> list[int]:
    """Return the widths of columns: the least ones, then the rest of `width` to names, sentences and headings."""
    cells = [max(map(len, [row[index] for row in rows]), default=0) for index in shown]
    least = [_least(columns, rows, index, place == 0) for place, index in enumerate(shown)]
    found = least if width is not None else [max(pair) for pair in zip(least, cells, strict=True)]
    left = (width or PIPE_WIDTH) - sum(found) - GAP * (len(shown) - 1)
    headings = [len(columns[index]) for index in shown]
    for wishes in (cells, headings):
        if wishes is headings and sum(max(0, wish - own) for wish, own in zip(wishes, found, strict=True)) > left:
            break  # all headings in one line, or each wraps
        for place, wish in enumerate(wishes):
            more = min(max(0, wish - found[place]), max(0, left))
            found[place], left = found[place] + more, left - more
    return found


def _lines(cells: Sequence[str], widths: Sequence[int], prose: Sequence[bool], bottom: bool = False) -> list[str]:
    """Return a row as lines of text: sentences and headings wrap, a name that is too long loses its beginning."""
    wrapped = []
    for place, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        if bottom or prose[place]:
            parts = textwrap.wrap(cell, max(1, width), break_long_words=False, break_on_hyphens=False) or [""]
        else:
            parts = [_shortened(cell, width) if place == 0 else cell]
        wrapped.append(parts)
    height = max(map(len, wrapped))
    lines = []
    for level in range(height):
        texts = []
        for place, (parts, width) in enumerate(zip(wrapped, widths, strict=True)):
            at = level - (height - len(parts)) if bottom else level
            text = parts[at] if 0 <= at < len(parts) else ""
            texts.append(text.ljust(width) if place == 0 or prose[place] else text.rjust(width))
        lines.append((" " * GAP).join(texts).rstrip())
    return lines


def _shortened(name: str, width: int) -> str:
    """Return the end of a dotted name that fits into `width`, from a dot on if there is one."""
    if len(name) <= width:
        return name
    end = name[len(name) - width + 1 :]
    return "…" + (end[end.index(".") :] if "." in end else end)


def _prose(rows: Sequence[Sequence[str]], shown: Sequence[int]) -> list[bool]:
    """Return True for columns of sentences; never for the first, which names the rows."""
    return [place > 0 and _is_prose([row[index] for row in rows]) for place, index in enumerate(shown)]


def _is_prose(cells: Sequence[str]) -> bool:
    """Return True if a cell is a sentence, which wraps."""
    return any(len(cell) > TEXT and " " in cell for cell in cells)


def _wrapped(text: str, width: int) -> str:
    """Return `text` in lines of at most `width` columns, broken at spaces alone."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)) or text
