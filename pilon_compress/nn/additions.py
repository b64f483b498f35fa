"""Additions of research modules to banks and projections, bound by the name that a layout holds.

    layout   research: {NAME: {KIND: [bank or projection, ...]}}      KIND of pilon_compress.research.NAME.form

The tensors of an addition belong to the bank or projection, so that they are saved and loaded with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import nn

from pilon_compress.config.research import bound, names

Kinds = dict[str, "Addition"]
_KNOWN: dict[str, Kinds] = {}


class Addition(ABC):
    """An addition to banks or projections, without state; research modules override what they need."""

    exact: tuple[str, ...] = ()
    """Names of tensors that stay in float32 whatever the model's type."""
    dense: str | None = None
    """Why a projection with it cannot become a plain matrix, if that is so."""

    @abstractmethod
    def add(self, module: nn.Module) -> None:
        """Add it, in place, to a bank or projection, with starting values."""

    def carry(self, old: nn.Module, new: nn.Module) -> nn.Module:
        """Add what `old` has to `new`, which takes its place; return the module to install: `new`, or one around it."""
        return new

    def packed(self, layer: nn.Module, made: nn.Module) -> None:  # noqa: B027 - most have nothing to add
        """Add to `made`, the packed form of a `layer` whose bank has this addition, what packing did not fold."""

    @abstractmethod
    def numbers(self, layout: Any, place: str) -> int:
        """Count the numbers that it stores at the bank or projection `place` of a layout."""


def register(name: str, kinds: Kinds) -> None:
    """Make the additions of a research module known: its file `form` calls this."""
    _KNOWN[name] = kinds


def addition(name: str, kind: str) -> Addition:
    """The addition of that kind. Raises ValueError where no such research module, or kind, is here."""
    if name not in _KNOWN and name in names():
        bound(name, "form")
    if kind not in _KNOWN.get(name, {}):
        raise ValueError(
            f"the layout has {kind} of research.{name}, which is not known: a newer pilon-compress wrote it?"
        )
    return _KNOWN[name][kind]


def places_of(value: Any) -> dict[str, dict[str, list[str]]]:
    """Read a layout's part `research`. Raises ValueError for anything that is no such part."""
    if not isinstance(value, dict) or not all(isinstance(kinds, dict) for kinds in value.values()):
        raise ValueError(f"the layout's research is no table of tables: {value!r:.60}")
    for name, kinds in value.items():
        for kind, places in kinds.items():
            if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
                raise ValueError(f"the layout's research.{name}.{kind} is no list of names: {places!r:.60}")
    return value


def entries(research: dict[str, dict[str, list[str]]]) -> Iterator[tuple[str, str, str]]:
    """(research module, kind, bank or projection) of every addition in a layout's part `research`."""
    for name, kinds in research.items():
        for kind, places in kinds.items():
            yield from ((name, kind, place) for place in places)


def add(module: nn.Module, name: str, kind: str) -> None:
    """Add, in place, `kind` of the research module `name` to a bank or projection."""
    addition(name, kind).add(module)
    mark(module, name, kind)


def mark(module: nn.Module, name: str, kind: str) -> None:
    """Note that a module has an addition: layouts are read from these notes."""
    module.additions = [*added(module), (name, kind)]  # type: ignore[assignment]


def added(module: nn.Module) -> list[tuple[str, str]]:
    """(research module, kind) of every addition that a bank or projection has."""
    return getattr(module, "additions", [])


def carry(old: nn.Module, new: nn.Module) -> nn.Module:
    """Add what `old` has to `new`, which takes its place; return the module to install."""
    for name, kind in added(old):
        new = addition(name, kind).carry(old, new)
    return new
