"""How recipes are read: checked by pydantic, mistakes reported with file and line, `--set a.b=value` applied.

What a recipe may say stands elsewhere: `recipe.Recipe` for conversions, `config.training.TrainRecipe` for training.
"""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from pilon_compress.config import strict_yaml
from pilon_compress.config.strict_yaml import Document
from pilon_compress.errors import BadInput
from pilon_compress.io.disk import read_bounded


def _selector(value: str) -> str:
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
    return value


Positive = Annotated[int, Field(ge=1, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Text = Annotated[str, Field(min_length=1, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Selector = Annotated[Text, AfterValidator(_selector)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """A set of fields of a recipe: unknown ones are refused, none changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    MOVED: ClassVar[dict[str, str]] = {}
    """Dotted names of fields that have moved, and where to."""

    @classmethod
    def parts(cls) -> dict[str, Any]:
        """Every field by name, with its type: the class of a section, where it is one."""
        return {name: field.annotation for name, field in cls.model_fields.items()}


def bundled() -> list[str]:
    """Names of the recipes that ship with the package."""
    entries = _home().iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def _home() -> Any:
    """Where recipes are: installed below the package, or beside it in a checkout that is not installed."""
    try:
        return files("pilon_compress.recipes")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "recipes"


def find(name_or_path: str) -> tuple[str, str]:
    """The bundled recipe of that name, else the file: (what messages call it, its text). Raises BadInput."""
    path = Path(name_or_path)
    with suppress(RuntimeError):  # no such user
        path = path.expanduser()
    if name_or_path in bundled():
        return f"{name_or_path}.yaml", (_home() / f"{name_or_path}.yaml").read_text("utf-8")
    try:
        return name_or_path, read_bounded(path, strict_yaml.LENGTH)
    except FileNotFoundError:
        raise BadInput(f"no recipe or file {name_or_path!r}{_alternatives(name_or_path, bundled())}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{name_or_path}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadInput(f"{name_or_path}: {getattr(error, 'strerror', None) or error}") from None


def kind(document: Document) -> Literal["train", "convert"] | None:
    """Which command a recipe is for: a training has a `task`, a conversion a `model`; None where there is neither."""
    if not isinstance(document.data, Mapping):
        return None
    return "train" if "task" in document.data else "convert" if "model" in document.data else None


def refuse(document: Document, name: str, other: Literal["train", "convert"]) -> None:
    """Raise BadInput where a recipe is for the `other` command."""
    if kind(document) == other:
        what = {"train": "trains a model", "convert": "converts a model"}[other]
        raise BadInput(f"{document.origin} {what}: pilon-compress {other} --recipe {name}")


_Model = TypeVar("_Model", bound=Section)


def load(
    model: type[_Model], name_or_path: str, overrides: Sequence[str], rival: Literal["train", "convert"]
) -> _Model:
    """The recipe of that name or in that file, with `overrides`; `rival`: the command whose recipes it must not be."""
    origin, text = find(name_or_path)
    document = strict_yaml.parse(text, origin)
    refuse(document, name_or_path, rival)
    return checked(model, document, overrides)


def checked(model: type[_Model], document: Document, overrides: Sequence[str] = ()) -> _Model:
    """Validate `document` with the overrides applied, or raise BadInput for the first error by line."""
    given = {} if document.data is None else document.data
    if not isinstance(given, Mapping):
        raise BadInput(f"{document.place(1)}: a recipe is a set of fields, as in `model: gpt2`")
    data, keys = _overridden(given, overrides)
    try:
        return model.model_validate(data)
    except ValidationError as invalid:
        errors = []
        for error in invalid.errors(include_url=False, include_context=False):
            path = _known_part(error["loc"], data)
            by = next((key for key in keys if _related(key.split("."), list(map(str, path)))), None)
            line = 0 if by else document.line(path)
            errors.append((line, f"--set {by}" if by else document.place(line), ".".join(map(str, path)), error))
        _, place, field, first = min(errors, key=lambda entry: entry[0])
        more = f" (+{len(errors) - 1} more)" if len(errors) > 1 else ""
        where = place if place == f"--set {field}" else f"{place}: {field}"
        raise BadInput(f"{where}: {_explain(first, model)}{more}") from None


def _overridden(data: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A copy of `data` with each "a.b=value" put in its place, and the dotted keys in order."""
    changed = copy.deepcopy(dict(data))
    values = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise BadInput(f"--set {item}: expected FIELD=VALUE, as in --set budget.ffn_ratio=0.5")
        values[key] = strict_yaml.parse(text, f"--set {key}").data
    budget = changed.get("budget")
    for key, rival in (("ffn_ratio", "preset"), ("preset", "ffn_ratio")):
        if values.get(f"budget.{key}") is not None and isinstance(budget, dict):
            budget.pop(rival, None)
    for key, value in values.items():
        *parents, leaf = key.split(".")
        section = changed
        for index, parent in enumerate(parents):
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise BadInput(f"--set {key}: {'.'.join(parents[: index + 1])} has no fields")
        section[leaf] = value
    return changed, list(values)


def _known_part(location: tuple[int | str, ...], data: Any) -> list[int | str]:
    """The part of pydantic's location that is a field or an item: it appends the branch of a union that failed."""
    path: list[int | str] = []
    for key in location:
        if isinstance(data, Mapping):
            path.append(key)
            data = data.get(str(key))
        elif isinstance(data, list) and isinstance(key, int):
            path.append(key)
            data = data[key]
        else:
            break
    return path


def _related(key: list[str], path: list[str]) -> bool:
    shared = min(len(key), len(path))
    return shared > 0 and key[:shared] == path[:shared]


def _explain(error: ErrorDetails, model: type[Section]) -> str:
    kind, location = error["type"], error["loc"]
    if kind == "missing":
        return "required, and not given"
    if kind == "extra_forbidden":
        if (name := ".".join(map(str, location))) in model.MOVED:
            return f"unknown field; {name} moved to {model.MOVED[name]}"
        return "unknown field" + _alternatives(str(location[-1]), _fields(model, location[:-1]))
    if kind == "model_type":
        return f"must be a section, with some of the fields {', '.join(_fields(model, location))}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = " ".join(repr(error["input"]).split())
    return f"{message} (got {given if len(given) <= 60 else given[:57] + '...'})"


def _fields(model: type[Section], location: Sequence[int | str]) -> list[str]:
    for key in location:
        section = model.parts()[str(key)]
        assert isinstance(section, type) and issubclass(section, Section)  # only sections forbid unknown fields
        model = section
    return list(model.parts())


def _alternatives(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
