"""`pilon-compress recipes`: the recipes that ship with the package, and checks of the user's own."""

import sys
from typing import Annotated

import typer

from pilon_compress.config import conversion, recipes, training

from .options import Set
from .output import print_json
from .parameters import Json
from .usage import Command, application

app = application(help="List, show and check recipes.")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a bundled recipe, or a YAML file.")]


@app.command("list", cls=Command)
def list_(as_json: Json = False) -> None:
    """List the recipes that ship with the package."""
    known = [(name, recipes.kind(name), description) for name, description in recipes.names()]
    if as_json:
        print_json({"recipes": [dict(zip(("name", "kind", "description"), row, strict=True)) for row in known]})
        return
    width = max(len(name) for name, _, _ in known)
    for name, kind, description in sorted(known, key=lambda row: (row[1], row[0])):
        print(f"{kind:<7}  {name:<{width}}  {description}")


@app.command(cls=Command)
def show(recipe: Recipe) -> None:
    """Print a recipe as written: a start for your own.

    pilon-compress recipes show quickstart > mine.yaml
    """
    sys.stdout.write(recipes.source(recipe))


@app.command(cls=Command)
def check(recipe: Recipe, set_: Set = None) -> None:
    """Check a recipe with overrides applied, and print it with its main settings spelled out."""
    written = recipes.check(recipe, set_ or [])
    if recipes.kind(recipe) == "train":
        from pilon_compress.models.architectures.registry import ARCHITECTURES

        ARCHITECTURES[training.load(recipe, set_ or []).host.family]  # raises for a name that nobody registered
    elif (named := conversion.load(recipe, set_ or []).form.bank_dtype) != "auto":
        from pilon_compress.nn.formats.registry import conversion_format

        conversion_format(named)  # likewise
    sys.stdout.write(written)
    print(f"{recipe}: ok")
