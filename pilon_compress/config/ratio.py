"""A ratio as people write it: 0.5, .5, 50%, 1/2 or 0,5; a size also by the name of a preset."""

import difflib
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

PRESETS = {"minimal": 0.9, "baseline": 0.75, "mild": 0.6, "moderate": 0.5, "aggressive": 0.25, "extreme": 0.1}

_NUMBER = r"(\d+[.,]?\d*|[.,]\d+)"
_PERCENT = re.compile(rf"{_NUMBER}\s*%")
_FRACTION = re.compile(rf"{_NUMBER}\s*/\s*{_NUMBER}")
_COMMA = re.compile(r"\d*,\d+")
_NO_WORDS = {"nan", "inf", "infinity"}


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


def parse_size(value: Any) -> Any:
    """Read a ratio, or the preset of that name. Raises ValueError as `parse_ratio` does."""
    if not isinstance(value, str) or value in PRESETS or not value.isalpha() or value.lower() in _NO_WORDS:
        return parse_ratio(PRESETS.get(value, value) if isinstance(value, str) else value)
    close = difflib.get_close_matches(value, PRESETS, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"must be a number, as in 0.5 or 50%, or one of {', '.join(PRESETS)}{hint}")


def parse_list(value: Any) -> Any:
    """Split a list that is written with commas, as in 0.6,40%,1/5; anything else stays as it is."""
    entries = value if isinstance(value, list) else [value]
    parts = [part.strip() if isinstance(part, str) else part for one in entries for part in _split(one)]
    return parts if isinstance(value, list | str) else value


def _split(value: Any) -> list[Any]:
    return value.split(",") if isinstance(value, str) else [value]


_SCHEMA = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[0-9.,/ ]+%?$"}]}
Ratio = Annotated[float, BeforeValidator(parse_ratio), Field(allow_inf_nan=False), WithJsonSchema(_SCHEMA)]
"""A finite number, also written 50% or 1/2; ranges are checked by the field that uses it."""
SizeRatio = Annotated[
    float,
    BeforeValidator(parse_size),
    Field(allow_inf_nan=False),
    WithJsonSchema({"anyOf": [*_SCHEMA["anyOf"], {"enum": list(PRESETS)}]}),
]
"""A ratio, or the name of one of PRESETS."""
Part = Annotated[Ratio, Field(gt=0, le=1)]
"""A ratio above 0 and at most 1."""
Parts = Annotated[list[Part], BeforeValidator(parse_list)]
"""Ratios as a list, or with commas between them as in 0.6,40%,1/5."""
