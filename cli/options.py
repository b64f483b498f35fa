"""Commands whose options are the fields of a config: names, help, defaults and checks come from the field alone.

    @configured(EvaluateConfig)
    def evaluate(settings: EvaluateConfig, as_json: Json = False) -> None: ...

No library that makes a command line of pydantic models (pydantic-settings, tyro, jsonargparse) keeps typer's parser,
hence one-line errors, panels and suggestions: this writes typer's parameters from `config.option.flags`.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import typer

from pilon_compress.config import reading, strict_yaml
from pilon_compress.config.option import RUNNING, Flag, flags, help_of
from pilon_compress.config.reading import Override, Section
from pilon_compress.config.strict_yaml import Document
from pilon_compress.errors import BadInput

Config = TypeVar("Config", bound=Section)

Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="Recipe to start from: a bundled one (see `recipes list`) or a YAML file. Options and --set take the "
        "place of what it says; an option and a --set that disagree are refused. Default: none.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Override a field of the recipe, as in seed=7; of two for the same field the last one counts. May be "
        "repeated. Default: none.",
    ),
]
_EMPTY = inspect.Parameter.empty
_FIELD = re.compile(r"(?<![\w./-])[a-z]\w*(\.[a-z]\w*)+(?![\w/])")  # a field of a section, in a message


class Recipes(NamedTuple):
    """A command that reads recipes.

    rival   the command whose recipes it refuses
    needs   message where neither a recipe nor options name what it works on
    """

    rival: Literal["train", "convert"]
    needs: str


class Configured(Generic[Config]):
    """A command as typer calls it: options in, the checked config and the command's own parameters out."""

    def __init__(self, model: type[Config], function: Callable[..., None], recipes: Recipes | None) -> None:
        self.model, self.function, self.recipes = model, function, recipes
        self.flags = flags(model)
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        own = list(inspect.signature(function).parameters.values())[1:]
        if recipes is not None:
            own += [_parameter("recipe", Recipe, None), _parameter("set_", Set, None)]
        made = [_generated(flag, self.flags, recipes is not None) for flag in self.flags]
        plain, panelled = ([one for one in own if (_order(one) > 1) is behind] for behind in (False, True))
        ordered = sorted([*plain, *made, *panelled], key=_order)
        ordered = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in ordered]
        self.__signature__ = inspect.Signature(ordered)
        self.__annotations__ = {one.name: one.annotation for one in ordered}

    def __call__(self, **values: Any) -> None:
        """Run the command with the config of parsed `values`. Raises BadInput."""
        settings = self.read(values)
        names = set(inspect.signature(self.function).parameters)
        try:
            self.function(settings, **{name: value for name, value in values.items() if name in names})
        except BadInput as error:  # of what only the library sees: it calls fields by their dotted names
            error.args = (_FIELD.sub(lambda word: self._option(word[0], values), str(error)),)
            raise

    def _option(self, word: str, values: dict[str, Any]) -> str:
        """Return the option that was typed for a dotted field; any other word as it is."""
        typed = (flag for flag in self.flags if _overrides(flag, values[_name(flag)]))
        return next((flag.name for flag in typed if word in (flag.path, f"{self.model.SECTION}.{flag.path}")), word)

    def read(self, values: dict[str, Any]) -> Config:
        """Return the config of parsed `values`, by the names of typer's parameters. Raises BadInput."""
        given = [one for flag in self.flags for one in _overrides(flag, values[_name(flag)])]
        recipe, extra = values.get("recipe"), [Override.parse(text) for text in values.get("set_") or []]
        if recipe is not None:
            assert self.recipes is not None
            return reading.load(self.model, recipe, [*given, *extra], self.recipes.rival)
        required = {name for name, info in self.model.model_fields.items() if info.is_required()}
        if self.recipes is not None and not required <= {one.field for one in (*given, *extra)}:
            raise BadInput(self.recipes.needs)
        return reading.checked(self.model, Document("command line", {}), [*given, *extra])


def configured(
    model: type[Config], recipes: Recipes | None = None
) -> Callable[[Callable[..., None]], Configured[Config]]:
    """Decorate a command whose first argument is a `model` made of the options that its fields declare."""
    return lambda function: Configured(model, function, recipes)


def _generated(flag: Flag, known: Sequence[Flag], recipes: bool) -> inspect.Parameter:
    """Return the parameter of a field; an argument may be left out where a recipe can name it."""
    words = help_of(flag, list(known))
    required = flag.info.is_required() and not recipes
    if flag.is_argument:
        words += " Not needed with a recipe that names one." if recipes else ""
        info: Any = typer.Argument(help=words, metavar=flag.name.upper(), show_default=False)
    else:
        metavar, panel = flag.metavar or None, flag.panel or None
        info = typer.Option(flag.name, help=words, metavar=metavar, show_default=False, rich_help_panel=panel)
    if flag.is_switch:
        return _parameter(_name(flag), Annotated[bool, info], False)
    kind: Any = list[str] if flag.is_list else str
    kind = kind if required else kind | None
    return _parameter(_name(flag), Annotated[kind, info], _EMPTY if required else None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _order(parameter: inspect.Parameter) -> int:
    """Return the place in help and usage: the argument, what has no panel, panels, and the last one of them."""
    (info,) = parameter.annotation.__metadata__
    if isinstance(info, typer.models.ArgumentInfo):
        return 0
    return 1 if info.rich_help_panel is None else 3 if info.rich_help_panel == RUNNING else 2


def _name(flag: Flag) -> str:
    """Return the name of typer's parameter for a flag."""
    return flag.name.strip("-").replace("-", "_")


def _overrides(flag: Flag, text: Any) -> list[Override]:
    """Return what a flag says, and what it sets besides; nothing where it was not given."""
    if text is None or text is False or (flag.is_list and not text):
        return []
    if text == "" and flag.mark.bare:
        return [Override(flag.mark.bare, True, flag.name)]
    value = list(text) if flag.is_list else text if flag.is_text or flag.is_switch else _scalar(flag, text)
    also = [Override(field, other, flag.name, beside=True) for field, other in flag.mark.also.items()]
    return [Override(flag.path, value, flag.name), *also]


def _scalar(flag: Flag, text: str) -> Any:
    """Return a number or list as YAML has it; text that is neither stays text, for the field to refuse."""
    value = strict_yaml.parse(text, flag.name).data
    return text if value is None else value
