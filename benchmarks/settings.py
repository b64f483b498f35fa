"""Training recipes as plain namespaces: a GPU machine may lack the library that checks them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

RECIPES = Path(__file__).parents[1] / "recipes"


def load(name: str, **overrides: Any) -> SimpleNamespace:
    """The recipe of that name with every default filled in; overrides by dotted name, as `a__b=value`."""
    schema = json.loads((RECIPES / "train.schema.json").read_text())
    data = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for key, value in overrides.items():
        *sections, leaf = key.split("__")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return _filled(data, schema, schema)


def _filled(data: dict[str, Any], section: dict[str, Any], schema: dict[str, Any]) -> SimpleNamespace:
    found = {}
    for name, field in section["properties"].items():
        kind = field.get("$ref") or next((part["$ref"] for part in field.get("allOf", []) if "$ref" in part), None)
        if kind is not None:
            inner = schema["$defs"][kind.rpartition("/")[2]]
            found[name] = _filled(data.get(name, {}), inner, schema)
        else:
            value = data.get(name, field.get("default"))
            found[name] = float(value) if field.get("type") == "number" and value is not None else value
    return SimpleNamespace(**found)
