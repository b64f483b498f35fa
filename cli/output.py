"""How results reach the terminal: tables on stdout, or one JSON object."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table


def print_json(result: dict[str, Any]) -> None:
    """One JSON object on stdout, and nothing else."""
    print(json.dumps(result, indent=2))


def notice(message: str) -> None:
    """One line on stderr."""
    Console(stderr=True, highlight=False).print(message, soft_wrap=True, markup=False)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; the first column is text, the others are right-aligned figures."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
