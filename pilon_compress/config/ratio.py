"""A ratio as people write it: 0.5, .5, 50%, 1/2 or 0,5."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from pilon_compress.errors import BadInput

_NUMBER = r"(\d+[.,]?\d*|[.,]\d+)"
_PERCENT = re.compile(rf"{_NUMBER}\s*%")
_FRACTION = re.compile(rf"{_NUMBER}\s*/\s*{_NUMBER}")
_COMMA = re.compile(r"\d*,\d+")


def parse_ratio(value: Any) -> Any:
    """Read a ratio as a float; None stays None. Raises ValueError for what is no number, and for a bare percentage."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number, as in 0.5, 50% or 1/2")
    found = _from_text(value.strip()) if isinstance(value, str) else float(value)
    if 10 <= found <= 100:
        raise ValueError(f"is far above 1: for {found:g} per cent give {found / 100:g} or {found:g}%")
    return found


def _from_text(text: str) -> float:
    if match := _PERCENT.fullmatch(text):
        return _decimal(match[1]) / 100
    if match := _FRACTION.fullmatch(text):
        below = _decimal(match[2])
        if below == 0:
            raise ValueError("divides by zero: give a number, as in 0.5, 50% or 1/2")
        return _decimal(match[1]) / below
    try:
        return _decimal(text) if _COMMA.fullmatch(text) else float(text)
    except ValueError:
        raise ValueError("must be a number, as in 0.5, 50% or 1/2") from None


def _decimal(text: str) -> float:
    return float(text.replace(",", "."))


def parse_ratios(option: str, value: str) -> list[float]:
    """Read ratios with commas between them, as in 0.6,40%,1/5. Raises BadInput that names `option`."""
    found = []
    for part in value.split(","):
        try:
            found.append(float(parse_ratio(part)))
        except ValueError as error:
            raise BadInput(f"{option} {value}: {part.strip()!r} {error}; commas stand between ratios") from None
    return found


Ratio = Annotated[
    float,
    BeforeValidator(parse_ratio),
    Field(allow_inf_nan=False),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[0-9.,/ ]+%?$"}]}),
]
"""A finite number, also written 50% or 1/2; ranges are checked by the field that uses it."""
