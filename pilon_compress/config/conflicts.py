"""Fields that another field switches off: a recipe that sets one of them is refused, whichever way it was set."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from pilon_compress.config.reading import Section

R = TypeVar("R", bound=Section)


@dataclass(frozen=True)
class Context(Generic[R]):
    """A setting that switches fields off: a test of the recipe, and its name in messages."""

    holds: Callable[[R], bool]
    words: Callable[[R], str]


Table = Mapping[str, Sequence[Context[R]]]
"""Dotted field -> settings that leave it without effect. A field at its default is never refused."""


def without_effect(recipe: R, table: Table[R], explicit: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for every field of `table` that is set and has no effect in `recipe`.

    explicit: fields whose default asks for something, which count also where the default is written out
    """
    for path, contexts in table.items():
        if _is_set(recipe, path, path in explicit):
            for context in contexts:
                if context.holds(recipe):
                    yield path, f"has no effect with {context.words(recipe)}"
                    break


def refused(found: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) with what to do about it."""
    for path, message in found:
        yield path, f"{message}: leave out one of the two"


def refuse_conflicts(section: Section, found: Iterable[tuple[str, str]]) -> None:
    """Raise pydantic's ValidationError for `found`, (dotted field of `section`, what is wrong), if there is any."""
    errors = [_error(path, message, _value(section, path)) for path, message in found]
    if errors:
        raise ValidationError.from_exception_data(type(section).__name__, errors)


def refuse_field(path: str, message: str, value: Any) -> None:
    """Raise pydantic's ValidationError at the dotted field `path`, from a validator of the section that has it."""
    raise ValidationError.from_exception_data("Recipe", [_error(path, message, value)])


def _error(path: str, message: str, value: Any) -> InitErrorDetails:
    kind = PydanticCustomError("conflict", "{reason}", {"reason": message})
    return InitErrorDetails(type=kind, loc=tuple(path.split(".")), input=value)


def _is_set(recipe: Section, path: str, explicit: bool) -> bool:
    *parents, name = path.split(".")
    section: Any = recipe
    for parent in parents:
        section = getattr(section, parent)
    if explicit and name in section.model_fields_set:
        return True
    return bool(getattr(section, name) != type(section).model_fields[name].default)


def _value(section: Section, path: str) -> Any:
    value: Any = section
    for name in path.split("."):
        value = getattr(value, name)
    return value
