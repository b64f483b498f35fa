"""`pilon-compress recipes`: the recipes that ship with the package, and checks of the user's own."""

import sys
from typing import Annotated

import typer

from pilon_compress.config import conversion

from .output import print_json
from .usage import Command, application

app = application(help="List, show and check recipes.")


@app.command("list", cls=Command)
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """List the recipes that ship with the package."""
    known = [(name, conversion.kind(name), description) for name, description in conversion.names()]
    if as_json:
        print_json({"recipes": [dict(zip(("name", "kind", "description"), row, strict=True)) for row in known]})
    else:
        width = max(len(name) for name, _, _ in known)
        for name, kind, description in sorted(known, key=lambda row: (row[1], row[0])):
            print(f"{kind:<7}  {name:<{width}}  {description}")


@app.command(cls=Command)
def show(name: Annotated[str, typer.Argument(help="Name of a bundled recipe, or a YAML file.")]) -> None:
    """Print a recipe as written: a start for your own.

    pilon-compress recipes show quickstart > mine.yaml
    """
    sys.stdout.write(conversion.source(name))


@app.command(cls=Command)
def check(
    file: Annotated[str, typer.Argument(help="A YAML file, or the name of a bundled recipe.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a field: a.b=value.")] = None,
) -> None:
    """Check a recipe, with overrides applied; print it with its main settings spelled out."""
    if conversion.kind(file) == "train":
        from pilon_compress.config import training as training

        sys.stdout.write(training.dump(training.load(file, set_ or [])))
    else:
        sys.stdout.write(conversion.dump(conversion.load(file, set_ or [])))
    print(f"{file}: ok")
