"""Registries: what can be added by one file, by name. A file registers its entry while it is imported.

Three kinds of files are imported before a registry is first read, in this order:

    the modules of the package that the registry belongs to
    the entry points of installed distributions in the group `pilon_compress.plugins`
    the modules and .py files that the environment variable PILON_PLUGINS names, separated by commas
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TypeVar

from pilon_compress.errors import BadInput

PLUGINS = "PILON_PLUGINS"
GROUP = "pilon_compress.plugins"
Entry = TypeVar("Entry")


class UnknownName(BadInput, KeyError):
    """A name that nobody registered."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


class Registry(Mapping[str, Entry]):
    """Entries by name, in the order of registration. `noun` is what messages call one, `package` whose files add some.

    Looking up a name that nobody registered raises BadInput, which lists the names that there are.
    """

    def __init__(self, noun: str, package: str = "") -> None:
        self.noun, self.package = noun, package
        self._entries: dict[str, Entry] = {}
        self._origins: dict[str, str] = {}
        self._read = False

    def add(self, name: str, entry: Entry) -> Entry:
        """Register `entry`, and return it. Raises BadInput for a name that is taken."""
        if name in self._entries:
            raise BadInput(f"there is a {self.noun} {name!r} already: register it under another name")
        self._entries[name] = entry
        self._origins[name] = sys._getframe(1).f_globals["__name__"]
        return entry

    def origin(self, name: str) -> str:
        """Return the name of the module that registered `name`."""
        return self._origins[name]

    def __getitem__(self, name: str) -> Entry:
        entries = self._all()
        if name not in entries:
            close = get_close_matches(str(name), entries, n=1, cutoff=0.7)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UnknownName(f"no {self.noun} {name!r}; {meant}there are {', '.join(entries)}")
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Entry]:
        if not self._read:
            self._read = True  # before the imports: a file that registers may read what is there so far
            if __name__ != "pilon_compress.plugins":
                return self._entries  # of a self-contained folder, which brings all entries that it needs
            if self.package:
                import_files(import_module(self.package))
            import_plugins()
        return self._entries


def import_files(package: ModuleType) -> None:
    """Import every module of a package, in alphabetical order."""
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")


@cache
def import_plugins() -> None:
    """Import the plug-ins of installed distributions and of PILON_PLUGINS, once. Raises BadInput for one that fails."""
    for point in entry_points(group=GROUP):
        _guarded(point.value, point.load)
    for name in filter(None, map(str.strip, os.environ.get(PLUGINS, "").split(","))):
        _guarded(name, partial(import_file, Path(name)) if name.endswith(".py") else partial(import_module, name))


def import_file(path: Path) -> ModuleType:
    """Import a .py file as a module that is named after it. Raises BadInput if it is missing."""
    if not path.is_file():
        raise BadInput(f"no such plug-in: {path}")
    name = path.stem
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _guarded(name: str, load: Callable[[], object]) -> None:
    try:
        load()
    except BadInput:
        raise
    except Exception as error:  # of code that is not ours
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"the plug-in {name} cannot be imported: {reason}") from error
