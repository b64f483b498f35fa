"""Parameters that no config has, once for all commands: where results go, and how they are printed."""

from typing import Annotated

import typer

from pilon_compress.config.option import RUNNING
from pilon_compress.errors import BadInput

Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Folder to write; it must be new or empty. Default: none, it must be named but for a dry run.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output in the folder.", rich_help_panel=RUNNING)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan with its sizes, and stop.", rich_help_panel=RUNNING)
]
Verbose = Annotated[bool, typer.Option("--verbose", help="List every layer in the tables.", rich_help_panel=RUNNING)]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object in place of tables and sentences.", rich_help_panel=RUNNING),
]


def named(output: str | None) -> str:
    """Return the folder to write. Raises BadInput if none is named."""
    if output is None:
        raise BadInput("name the folder to write with -o")
    return output
