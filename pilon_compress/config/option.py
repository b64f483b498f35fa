"""Options of the command line: marks at the fields of a config, and the list of options that they make.

    rank: Annotated[Positive | None, Option()] = None
    \"\"\"Rank of each primitive. Default: as large as `ffn_ratio` allows.\"\"\"

is all that `--rank` needs: name, help, panel, default and checks follow from the field.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

RUNNING = "Running"  # panel of what changes no result: device, seed, output
_CODE = re.compile(r"`([a-z_.]+)`")  # a field, where a docstring mentions one


@dataclass(frozen=True)
class Option:
    """Mark of a field that is an option of the command line. A field may have several.

    name      with its dashes; by default the field's, behind the prefix of its section
    panel     heading of the help that it stands under; by default its section's
    metavar   word for the value in the help; by default from the field's type
    help      sentences in place of the field's docstring
    tail      sentences behind it; {module:REGISTRY} in them stands for the entries of a registry, plug-ins included
    also      values of other fields that the option sets, by dotted name
    bare      dotted switch that the option sets, and nothing else, where no value follows it
    """

    name: str = ""
    panel: str = ""
    metavar: str = ""
    help: str = ""
    tail: str = ""
    also: dict[str, Any] = field(default_factory=dict)
    bare: str = ""


@dataclass(frozen=True)
class Argument:
    """Mark of a field that is the positional argument of a command."""


@dataclass(frozen=True)
class Options:
    """Mark of a section: panel and prefix of the options that its fields are; with `only`, these fields alone."""

    panel: str
    prefix: str = ""
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flag:
    """An option (or the argument, whose `name` has no dashes) of a command, and the field that it sets."""

    path: str
    name: str
    panel: str
    info: FieldInfo
    mark: Option = Option()

    @cached_property
    def types(self) -> list[Any]:
        """Types that the field takes, None left out: `int` and `list[list[int]]` of a number or lists of layers."""
        return [one for one in members(self.info.annotation) if one is not NoneType]

    @cached_property
    def choices(self) -> list[str]:
        """Values of a field that takes one of several words; empty for any other."""
        return [str(word) for one in self.types if get_origin(one) is Literal for word in get_args(one)]

    @property
    def is_argument(self) -> bool:
        """True for the positional argument."""
        return not self.name.startswith("-")

    @property
    def is_switch(self) -> bool:
        """True if the option takes no value, and sets its field to True."""
        return self.types == [bool]

    @property
    def is_list(self) -> bool:
        """True if the option may be repeated."""
        return all(get_origin(one) is list for one in self.types)

    @property
    def is_text(self) -> bool:
        """True if the field takes the value as it is written, without a look for numbers and lists."""
        return self.is_list or bool(self.choices) or str in self.types

    @property
    def metavar(self) -> str:
        """Word for the value: the choices where they fit, N for integers."""
        choices = f"[{'|'.join(self.choices)}]"
        if self.mark.metavar or self.is_switch:
            return self.mark.metavar
        if self.choices and len(choices) <= 60:
            return choices
        named = {"int": "N", "float": "X", "list": "NAME"}
        return named.get(getattr(get_origin(self.types[0]) or self.types[0], "__name__", ""), "NAME")

    @property
    def default(self) -> str:
        """Default as help shows it; empty where there is none, or where the docstring says what None stands for."""
        value = self.info.get_default(call_default_factory=True)
        if self.info.is_required() or value is None or value == [] or self.is_switch or self.mark.also:
            return ""
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def flags(model: type[BaseModel]) -> list[Flag]:
    """Return the options of `model` and of its sections, in the order of the fields."""
    return list(_flags(model, "", Options("")))


def _flags(model: type[BaseModel], parent: str, section: Options) -> Iterator[Flag]:
    for name, info in model.model_fields.items():
        if section.only and name not in section.only:
            continue
        for mark in info.metadata:
            if isinstance(mark, Argument):
                yield Flag(parent + name, name, "", info)
            if isinstance(mark, Option):
                word = mark.name or f"--{section.prefix}{name.replace('_', '-')}"
                yield Flag(parent + name, word, mark.panel or section.panel, info, mark)
            if isinstance(mark, Options):
                yield from _flags(_section(info), f"{parent}{name}.", mark)


def _section(info: FieldInfo) -> type[BaseModel]:
    assert isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    return info.annotation


def members(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, or the type itself, without their Annotated."""
    if get_origin(annotation) is Annotated:
        yield from members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for one in get_args(annotation):
            yield from members(one)
    else:
        yield annotation


def help_of(flag: Flag, known: list[Flag]) -> str:
    """Return the sentences of an option's help: fields in backquotes are called by the option that sets them."""
    near = flag.path.rpartition(".")[0]
    names = {one.path: one.name for one in reversed(known)}

    def named(field: re.Match[str]) -> str:
        return names.get(f"{near}.{field[1]}".lstrip("."), names.get(field[1], field[1]))

    words = _CODE.sub(named, " ".join(f"{flag.mark.help or flag.info.description} {flag.mark.tail}".split()))
    if flag.choices and not flag.metavar.startswith("["):
        words += f" One of {', '.join(flag.choices)}."
    if flag.is_list:
        words += " May be repeated."
    return f"{words}  [default: {flag.default}]" if flag.default else words
