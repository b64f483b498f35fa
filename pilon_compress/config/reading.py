"""Read recipes: checked by pydantic, options applied, mistakes reported with file and line or by the option.

What a recipe may say stands elsewhere: `conversion.Recipe` for conversions, `training.TrainRecipe` for training.
"""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from pilon_compress.config import strict_yaml
from pilon_compress.config.option import flags, members
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


PLAIN = {
    "^should be": "must be",
    r"^must be a valid (\w+).*": r"must be a \1",
    r"^\w+ should have at least 1 \w+.*": "must not be empty",
    "a (?=integer)": "an ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}
"""Pydantic's words -> ours, in the messages of its checks."""


class Override(NamedTuple):
    """A value that takes the place of a recipe's: dotted field, value, and the option that gave it, as messages say.

    `beside` another field that the option is for: --heal names a model, and the task beside it.
    """

    field: str
    value: Any
    option: str
    beside: bool = False

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Read "a.b=value", as `--set` takes it. Raises BadInput."""
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise BadInput(f"--set {text}: expected FIELD=VALUE, as in --set budget.ffn_ratio=0.5")
        return cls(key, strict_yaml.parse(value, f"--set {key}").data, f"--set {key}")

    @property
    def generic(self) -> bool:
        """True for --set, whose field messages call by its dotted name."""
        return self.option.startswith("--set ")


class Section(BaseModel):
    """Base class of sections and configs: unknown fields are refused, none changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    SECTION: ClassVar[str] = ""
    """Name of the recipe's section that the fields are those of: messages call them by it."""

    MOVED: ClassVar[dict[str, str]] = {}
    """Dotted names of fields that have moved, and where to."""

    @classmethod
    def parts(cls) -> dict[str, Any]:
        """Return the type of every field by name: the class of a section, where it is one."""
        return {name: field.annotation for name, field in cls.model_fields.items()}


def bundled() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    entries = _home().iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def _home() -> Any:
    """Return the folder of recipes: below the package, or beside it in a checkout that is not installed."""
    try:
        return files("pilon_compress.recipes")
    except ModuleNotFoundError:
        return Path(__file__).parents[2] / "recipes"


def find(name_or_path: str) -> tuple[str, str]:
    """Return the bundled recipe of that name, else the file: (its name in messages, its text). Raises BadInput."""
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
    """Return the command that a recipe is for: a training has a `task`, a conversion a `model`; None if neither."""
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
    model: type[_Model],
    name_or_path: str,
    overrides: Sequence[str | Override],
    rival: Literal["train", "convert"],
) -> _Model:
    """Return the recipe of that name or in that file, with `overrides`; recipes of the command `rival` are refused."""
    origin, text = find(name_or_path)
    document = strict_yaml.parse(text, origin)
    refuse(document, name_or_path, rival)
    return checked(model, document, overrides)


def checked(model: type[_Model], document: Document, overrides: Sequence[str | Override] = ()) -> _Model:
    """Validate `document` with the overrides applied, or raise BadInput for the first error by line."""
    given = {} if document.data is None else document.data
    if not isinstance(given, Mapping):
        raise BadInput(f"{document.place(1)}: a recipe is a set of fields, as in `model: gpt2`")
    settled = _settled([Override.parse(one) if isinstance(one, str) else one for one in overrides])
    data = _overridden(given, settled)
    try:
        return model.model_validate(data)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_context=False)
        placed = [(*_place(error, document, data, settled), error) for error in errors]
        _, where, first = min(placed, key=lambda entry: entry[0])
        more = f" (+{len(placed) - 1} more)" if len(placed) > 1 else ""
        message = _explain(first, model)
        if first["type"] == "conflict":
            names = {one.field: one.option for one in settled if not one.generic and not one.beside}
            if where.startswith("--") and not where.startswith("--set "):
                names = {flag.path: flag.name for flag in flags(model)} | names
            message = _by_option(message, names)
        raise BadInput(f"{where}: {message}{more}") from None


def _place(error: ErrorDetails, document: Document, data: Any, overrides: Sequence[Override]) -> tuple[int, str]:
    """Return the line of an error, 0 where an option made it, and what the message begins with."""
    path = _known_part(error["loc"], data)
    field = ".".join(map(str, path))
    by = next((one for one in overrides if _related(one.field.split("."), list(map(str, path)))), None)
    if by is None:
        line = document.line(path)
        return line, f"{document.place(line)}: {field}".removesuffix(": ")
    exact = field == by.field or not by.generic and field.startswith(f"{by.field}.")
    return 0, by.option if exact else f"{by.option}: {field}"


def _by_option(message: str, names: Mapping[str, str]) -> str:
    """Call the fields of a message by the options that set them: `names`, by dotted field."""
    return re.sub(r"(?<![\w.-])[a-z_]+(\.[a-z_]+)*", lambda word: names.get(word[0], word[0]), message)


def _settled(overrides: Sequence[Override]) -> list[Override]:
    """Return one override per field: the last --set. Raises BadInput where options disagree."""
    found: dict[str, Override] = {}
    for one in overrides:
        other = found.get(one.field)
        if other is not None and not (other.generic and one.generic):
            _refuse_unequal(other, one, one.value)
        found[one.field] = one if other is None or other.generic else other
    return list(found.values())


def _refuse_unequal(one: Override, other: Override, value: Any) -> None:
    if value != one.value:
        raise BadInput(f"{one.option} and {other.option} disagree: leave out one of the two")


def _overridden(data: Mapping[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """Return a copy of `data` with each override put in its place, in order."""
    changed = copy.deepcopy(dict(data))
    for one in overrides:
        *parents, leaf = one.field.split(".")
        section = changed
        for index, parent in enumerate(parents):
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise BadInput(f"{one.option}: {'.'.join(parents[: index + 1])} has no fields")
        section[leaf] = copy.deepcopy(one.value)
    for one in overrides:
        whole = next((other for other in overrides if one.field.startswith(f"{other.field}.")), None)
        if whole is not None and not one.generic:  # --set of a section may have replaced what an option said
            _refuse_unequal(one, whole, _at(changed, one.field))
    return changed


def _at(data: Any, field: str) -> Any:
    for name in field.split("."):
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


def _known_part(location: tuple[int | str, ...], data: Any) -> list[int | str]:
    """Return the fields and items of pydantic's location, without the branch of a union that it appends."""
    path: list[int | str] = []
    for key in location:
        if isinstance(data, Mapping):
            path.append(key)
            data = data.get(str(key))
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):  # text with commas has more parts
            path.append(key)
            data = data[key]
        else:
            break
    return path


def _related(key: list[str], path: list[str]) -> bool:
    shared = min(len(key), len(path))
    return shared > 0 and key[:shared] == path[:shared]


def first_error(invalid: ValidationError, model: type[Section]) -> str:
    """Return the first error of a config that was written in Python, as one line that names the field."""
    errors = invalid.errors(include_url=False, include_context=False)
    more = f" (+{len(errors) - 1} more)" if len(errors) > 1 else ""
    field = ".".join(str(key) for key in errors[0]["loc"])
    message = f"{model.__name__}: {field}: {_explain(errors[0], model)}{more}"
    return re.sub(rf"\b[a-z]+\.({'|'.join(model.model_fields)})\b", r"\1", message)  # flat here, sections in recipes


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
    for theirs, plain in PLAIN.items():
        message = re.sub(theirs, plain, message)
    if error["input"] is True:  # a switch
        return message
    given = " ".join(repr(error["input"]).split())
    return f"{message} (got {given if len(given) <= 60 else given[:57] + '...'})"


def _fields(model: type[Section], location: Sequence[int | str]) -> list[str]:
    for key in location:
        kinds = members(model.parts()[str(key)])  # of a section, or of one that may be left out
        model = next(one for one in kinds if isinstance(one, type) and issubclass(one, Section))
    return list(model.parts())


def _alternatives(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
