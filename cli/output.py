"""How results reach the terminal: tables on stdout, or one JSON object."""

import json
import os
import textwrap
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH = 120


def wait_passively() -> None:
    """Let OpenMP threads sleep while they wait, unless the user says otherwise. To be called before torch is imported.

    By default they spin, which on cores that others use makes small decompositions seven times as slow
    (docs/results/real-models.md). Kernels of microseconds want the spinning, so this is for conversions only.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def print_json(result: dict[str, Any]) -> None:
    """One JSON object on stdout, and nothing else."""
    print(json.dumps(result, indent=2))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are right-aligned figures. Empty columns are left out."""
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    columns, rows = [columns[index] for index in used], [[row[index] for index in used] for row in rows]
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH  # a pipe has no width; do not cut figures short
    widest = [max((len(row[index]) for row in rows), default=0) for index in range(len(columns))]
    if sum(2 + max(len(column), width) for column, width in zip(columns, widest, strict=True)) > console.width:
        # wrapped here, because rich would cut figures where it could wrap headings
        columns = [
            textwrap.fill(column, max(8, width), break_long_words=False)
            for column, width in zip(columns, widest, strict=True)
        ]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", markup=False)
    console.print(table)
