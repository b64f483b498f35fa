"""Sections of a training recipe that belong to `pilon_compress.research`, bound by name.

    research:
      original: {...}      ->  class Settings of pilon_compress.research.original.settings

Nothing of the core imports research: a module of it is loaded when a recipe or a saved layout names it, and here alone.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails

from pilon_compress.config.reading import Section

if TYPE_CHECKING:
    from pilon_compress.config.training import TrainRecipe

PACKAGE = "pilon_compress.research"


class ResearchSection(Section):
    """Fields that one research module adds to a training recipe."""

    def conflicts(self, recipe: "TrainRecipe") -> Iterator[tuple[str, str]]:
        """Yield (dotted field of the section, what is wrong) for every field that does not go with the recipe."""
        yield from ()

    @property
    def weight_decay_ends(self) -> float | None:
        """Share of a ternary training after which weight decay is off; None: as without research."""
        return None

    def marks(self) -> list[tuple[float, str]]:
        """(share of the training, label) of every change that the report's curves mark."""
        return []


def names() -> list[str]:
    """Names of the research modules that a recipe can name."""
    return sorted(entry.name for entry in iter_modules(import_module(PACKAGE).__path__) if entry.ispkg)


def bound(name: str, part: str) -> ModuleType:
    """The module `part` of the research module `name`, one of `names()`."""
    return import_module(f"{PACKAGE}.{name}.{part}")


def _settings(name: str) -> type[ResearchSection]:
    found: type[ResearchSection] = bound(name, "settings").Settings
    return found


class Research(Section):
    """Research modules to use, each with its own fields; none is loaded that is not named."""

    model_config = ConfigDict(extra="allow")

    @property
    def sections(self) -> Mapping[str, ResearchSection]:
        """The sections that the recipe names, by module name."""
        return self.__pydantic_extra__ or {}

    @classmethod
    def parts(cls) -> dict[str, Any]:
        """Return the settings class of every research module, by name."""
        return {name: _settings(name) for name in names()}

    @model_validator(mode="before")
    @classmethod
    def _bind(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known, made, errors = names(), dict[str, Any](), list[InitErrorDetails]()
        for name, given in data.items():
            if name not in known:
                errors.append(InitErrorDetails(type="extra_forbidden", loc=(name,), input=given))
                continue
            try:
                made[name] = _settings(name).model_validate(given)
            except ValidationError as invalid:
                errors += [_below(name, dict(error)) for error in invalid.errors()]
        if errors:
            raise ValidationError.from_exception_data("Research", errors)
        return made

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return a schema with every module's fields, so that editors complete them."""
        own = handler.resolve_ref_schema(handler(core_schema))
        schemas = {name: handler(section.__pydantic_core_schema__) for name, section in cls.parts().items()}
        own["properties"] = {name: {"default": None, **schema} for name, schema in schemas.items()}
        own["additionalProperties"] = False
        return own


def _below(name: str, error: dict[str, Any]) -> InitErrorDetails:
    """An error of the section `name` as one of all research."""
    location = (name, *error["loc"])
    return InitErrorDetails(type=error["type"], loc=location, input=error["input"], ctx=error.get("ctx", {}))
