"""Configs that Python programs write: fields of several sections side by side, for the recipe to sort.

A flat config inherits the sections whose fields it has, so that every field is declared once.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from pilon_compress.config import reading
from pilon_compress.config.reading import Section
from pilon_compress.errors import BadInput

R = TypeVar("R", bound=Section)


class Flat(Section):
    """The base of flat configs: mistakes raise BadInput, in one line."""

    if not TYPE_CHECKING:  # type checkers know the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as invalid:
                raise BadInput(reading.first_error(invalid, type(self))) from None

        # so that `model_validate`, which the command line uses, does not come here: its errors name options
        __init__.__pydantic_base_init__ = True


def arranged(config: Section, recipe: type[R], fixed: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> R:
    """Return the `recipe` that has the fields which are set in the flat `config`, each in its section.

    fixed: fields at the top of the recipe   given: fields of sections, which win where they are not None

    Raises BadInput, in one line, where fields exclude each other.
    """
    data: dict[str, Any] = dict(fixed)
    for name in recipe.model_fields:
        section = recipe.parts()[name]
        if isinstance(section, type) and issubclass(section, Section):
            fields = _set(config, _shared(type(config), section))
            if isinstance(nested := getattr(config, name, None), Section):
                fields |= _set(nested, section.model_fields)
            data[name] = fields | {key: value for key, value in given.get(name, {}).items() if value is not None}
        elif name in _shared(type(config), recipe) and name in config.model_fields_set:
            data.setdefault(name, getattr(config, name))
    try:
        return recipe.model_validate(data)
    except ValidationError as invalid:
        raise BadInput(reading.first_error(invalid, type(config))) from None


def _shared(flat: type[Section], section: type[Section]) -> list[str]:
    """Names of the fields that both inherit from the same class."""
    common = [one for one in section.__mro__ if one in flat.__mro__ and one is not Section and issubclass(one, Section)]
    return [name for one in common for name in one.model_fields]


def _set(section: Section, names: Any) -> dict[str, Any]:
    """Return the fields of `names` that were set."""
    return {name: getattr(section, name) for name in names if name in section.model_fields_set}
