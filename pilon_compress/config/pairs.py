"""Read a section from one option of the command line: "experts=8,top_k=2"."""

from typing import Any

from pilon_compress.config import strict_yaml


def fields_of(value: Any, option: str, example: str) -> Any:
    """Return the fields of "NAME=VALUE,..."; anything but such a text as it is, for pydantic to check.

    Raises ValueError for a text of another form, with an `example` of the right one.
    """
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(equals and name.strip() and text.strip() for name, equals, text in pairs):
        raise ValueError(f"must be FIELD=VALUE with commas between them, as in {example}")
    return {name.strip(): strict_yaml.parse(text.strip(), f"{option} {name}").data for name, _, text in pairs}
