"""Read the documentation of Python itself, which every machine has."""

import ast
import os
import pydoc_data.topics
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from pilon_compress.data.readers.registry import source
from pilon_compress.errors import BadInput

NOT_PROSE = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__")
SHORTEST_DOCSTRING = 200  # characters


@source(
    "stdlib",
    form="stdlib[:topics|:docstrings]",
    about="Python's language reference, and the docstrings of its standard library.",
    fingerprint=lambda spec: sys.version,
)
def documents(spec: str) -> Iterator[str]:
    """Yield the documents of stdlib:topics, of stdlib:docstrings, or of both. Raises BadInput for another name."""
    half = spec.partition(":")[2]
    sources: dict[str, Callable[[], Iterator[str]]] = {"": _both, "topics": _topics, "docstrings": _docstrings}
    if half not in sources:
        raise BadInput(f"stdlib:{half}: the standard library's text is stdlib, stdlib:topics or stdlib:docstrings")
    return sources[half]()


def _both() -> Iterator[str]:
    yield from _topics()
    yield from _docstrings()


def _topics() -> Iterator[str]:
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield text


def _docstrings() -> Iterator[str]:
    root = sysconfig.get_path("stdlib")
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - set(NOT_PROSE))
        for name in sorted(names):
            if name.endswith(".py"):
                yield from _docstrings_of(Path(folder, name))


@cache  # two seconds of parsing for all files, 2 MB of text; a conversion reads them once more to be evaluated
def _docstrings_of(path: Path) -> tuple[str, ...]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated escapes in other code's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return tuple(text for text in texts if text is not None and len(text) >= SHORTEST_DOCSTRING)
