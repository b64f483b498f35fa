"""YAML for people: positions kept for messages, duplicate keys refused, and the scalars of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` a boolean, `1:20` a number in base 60 and `012` one in base 8.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import yaml

from pilon_compress.errors import BadInput

LENGTH = 1 << 19  # characters
DEPTH, PARTS = 32, 10_000  # of a document, its aliases written out

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(~|null|Null|NULL|)$")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"[-+]?(0|[1-9]\d*)$")
_FLOAT = re.compile(r"[-+]?((\.\d+|\d+\.\d*)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$")
_DIGITS = list("-+.0123456789")


@dataclass(frozen=True)
class Document:
    """Parsed data, and where each part of it stands."""

    origin: str
    """Name in messages: a file, or the option that the text came from."""
    data: Any
    root: yaml.Node | None = None

    def line(self, path: Sequence[int | str]) -> int:
        """Line, from 1, of the deepest part of `path` that is in the document."""
        node, line = self.root, 1
        for key in path:
            if isinstance(node, yaml.MappingNode):
                found = next((pair for pair in node.value if pair[0].value == str(key)), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
                node = node.value[key]
                line = node.start_mark.line + 1
        return line

    def place(self, line: int) -> str:
        """`origin:LINE` where there are lines, else the origin."""
        return self.origin if self.root is None else f"{self.origin}:{line}"


def parse(text: str, origin: str) -> Document:
    """The data in `text`; None when it is empty. Raises BadInput with the line, and for text beyond the limits."""
    if len(text) > LENGTH:
        raise BadInput(f"{origin}: longer than {LENGTH:,} characters: not a recipe")
    try:
        _bound(text, origin)
        root = yaml.compose(text, Loader=_Loader)
        return Document(origin, None if root is None else _value(root, origin, count()), root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{origin}:{mark.line + 1}" if mark else origin
        raise BadInput(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{origin}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise BadInput(f"{origin}: not valid YAML: nested too deeply") from None


def dump(data: Any) -> str:
    """YAML that `parse` reads back unchanged: mappings as blocks in their order, lists in brackets."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _bound(text: str, origin: str) -> None:
    """Raise BadInput for a document that is too deep or has too many parts, before it is built."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH or number > PARTS:
            words = f"nested deeper than {DEPTH}" if depth > DEPTH else f"more than {PARTS:,} parts"
            raise BadInput(f"{origin}:{event.start_mark.line + 1 if event.start_mark else 1}: {words}: not a recipe")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes a string that either version of YAML would read as something else."""

    def brackets(self, data: list[Any]) -> yaml.SequenceNode:
        return self.represent_sequence(_TAG + "seq", data, flow_style=True)


_Loader.add_implicit_resolver(_TAG + "null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INT, _DIGITS)
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, _DIGITS)
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, _DIGITS)
_Dumper.add_representer(list, _Dumper.brackets)

_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: text.lower() == "true",
    _TAG + "int": int,
    _TAG + "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    _TAG + "str": str,
}


def _value(node: yaml.Node, origin: str, parts: Iterator[int]) -> Any:
    """The plain data of `node`; `parts` counts them, since an alias repeats all that it stands for."""
    if next(parts) > PARTS:
        raise _refused(node, origin, f"its aliases (*NAME) expand to more than {PARTS:,} parts")
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, origin, parts) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(key, origin, "a key must be a word")
            if key.value in data:
                raise _refused(key, origin, f"{key.value} is given twice")
            data[key.value] = _value(value, origin, parts)
        return data
    try:
        return _SCALARS[node.tag](node.value)
    except (KeyError, ValueError):
        raise _refused(node, origin, f"{node.value!r} is not a value of type {node.tag.removeprefix(_TAG)}") from None


def _refused(node: yaml.Node, origin: str, message: str) -> BadInput:
    return BadInput(f"{origin}:{node.start_mark.line + 1}: {message}")
