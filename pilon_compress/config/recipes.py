"""Recipes of both kinds by name: those that ship with the package, and the user's own files."""

from collections.abc import Sequence
from typing import Literal

from pilon_compress.config import conversion, reading, strict_yaml, training


def names() -> list[tuple[str, str]]:
    """Return the bundled recipes: (name, one-line description from the file's first comment)."""
    return [(name, source(name).partition("\n")[0].lstrip("# ")) for name in reading.bundled()]


def kind(name_or_path: str) -> Literal["train", "convert"]:
    """Return the command that a recipe is for. Raises BadInput for a file that cannot be read."""
    origin, text = reading.find(name_or_path)
    return reading.kind(strict_yaml.parse(text, origin)) or "convert"


def source(name_or_path: str) -> str:
    """Return a recipe's YAML as written, comments included. Raises BadInput if there is none of that name."""
    return reading.find(name_or_path)[1]


def check(name_or_path: str, overrides: Sequence[str] = ()) -> str:
    """Return a recipe as YAML, `overrides` applied and its main settings spelled out. Raises BadInput for mistakes."""
    if kind(name_or_path) == "train":
        return training.dump(training.load(name_or_path, overrides))
    return conversion.dump(conversion.load(name_or_path, overrides))
