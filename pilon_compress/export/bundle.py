"""Bundles source files: the loading code of a model as one Python file, without imports of this package.

Modules are followed from their imports, `from pilon_compress.X import name`, as far as the rooms in TRAVELS; what else
they import (kernels, configs) must not be needed where the file is loaded.
"""

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

PACKAGE = "pilon_compress"
TRAVELS = ("errors", "plugins", "nn", "io.checksum", "kernels.reference")


def bundle(roots: Iterable[ModuleType]) -> str:
    """Return the source of `roots` and of the modules that they import, each behind those that it imports.

    Modules share one namespace: no two may use a name for different things.
    """
    found: dict[str, str] = {}
    for root in roots:
        _follow(root, found)
    return "\n\n".join(found.values())


def _follow(module: ModuleType, found: dict[str, str]) -> None:
    if module.__name__ in found:
        return
    source = inspect.getsource(module)
    tree = ast.parse(source)
    for name in dict.fromkeys(_imported(tree)):
        if _travels(name) and name != module.__name__:
            _follow(sys.modules.get(name) or import_module(name), found)
    found[module.__name__] = _without_imports(source, tree)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of the package that a source file imports at its top."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and _ours(node.module):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if find_spec(str(node.module)) and _is_module(submodule) else str(node.module)


def _is_module(name: str) -> bool:
    parent = import_module(name.rpartition(".")[0])
    return hasattr(parent, "__path__") and find_spec(name) is not None


def _travels(name: str) -> bool:
    return any(f"{name}.".startswith(f"{PACKAGE}.{room}.") for room in TRAVELS)


def _ours(name: str | None) -> bool:
    return name == PACKAGE or str(name).startswith(f"{PACKAGE}.")


def _without_imports(source: str, tree: ast.Module) -> str:
    """Return the source without imports of the package, and without those for type checkers."""
    lines = source.splitlines()
    for node in tree.body:
        ours = isinstance(node, ast.ImportFrom) and _ours(node.module)
        ours = ours or (isinstance(node, ast.Import) and any(_ours(alias.name) for alias in node.names))
        types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if ours or types:
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)
