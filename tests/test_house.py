"""The rooms of the package: imports point down only, no two modules import each other, and the core knows no research.

Read from the source files, imports inside functions and under TYPE_CHECKING included.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"pilon_compress": ROOT / "pilon_compress", "pilon_compress.cli": ROOT / "cli"}
FLOORS: list[set[str]] = [  # from the top: a module imports from its own room, and from floors below it
    {"cli"},
    {"__init__"},
    {"api"},
    {"research"},
    {"train", "compare"},
    {"convert"},
    {"distill"},
    {"optimize"},
    {"bench"},
    {"export"},
    {"evaluate"},
    {"report"},
    {"parallel"},
    {"models"},
    {"data", "elastic", "tiers"},
    {"nn"},
    {"config", "kernels"},
    {"io"},
    {"plugins", "results"},
    {"errors"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
CONVERT = ["neurons", "sharing", "allocate", "solve", "calibrate", "plan"]  # inside convert, from the top


def modules() -> dict[str, Path]:
    """Source file of every module, by dotted name."""
    found = {}
    for package, folder in ROOMS.items():
        for path in folder.rglob("*.py"):
            parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(name: str, path: Path, known: dict[str, Path], source: str, types: bool = True) -> Iterator[str]:
    """Modules of the package that `source`, of a module, imports anywhere in it; `types`: for type checkers, too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(source)
    if not types:
        tree.body = [node for node in tree.body if not _for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                if whole in known or origin in known:
                    yield whole if whole in known else origin


def _for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports into another room that is not on a lower floor."""
    return [
        f"{name} ({room(name)}) imports {target} ({room(target)})"
        for name, targets in sorted(edges.items())
        for target in sorted(targets)
        if room(target) != room(name)
        and FLOOR[room(target)] <= FLOOR[room(name)]
        # the package's own version and names, which every room may read
        and not (target == "pilon_compress" and room(name) != "__init__")
    ]


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Return a line for every circle of imports."""
    found, done = list[str](), set[str]()

    def walk(name: str, road: list[str]) -> None:
        if name in road:
            found.append(" imports ".join([*road[road.index(name) :], name]))
        elif name not in done:
            for target in sorted(edges.get(name, ())):
                walk(target, [*road, name])
            done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def graph(types: bool) -> dict[str, set[str]]:
    known = modules()
    return {
        name: set(imported(name, path, known, path.read_text("utf-8"), types)) - {name} for name, path in known.items()
    }


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    return graph(types=True)


def test_every_room_has_a_floor():
    assert {room(name) for name in modules()} <= FLOOR.keys()


def test_imports_point_down(edges):
    found = upward(edges)
    assert not found, "\n".join(["imports point down only, see FLOORS:", *found])


def step(module: str) -> int | None:
    """Place of a module among CONVERT; None outside of them."""
    package, *rest = module.split(".")[1:3] or [""]
    return CONVERT.index(rest[0]) if package == "convert" and rest and rest[0] in CONVERT else None


def climbing(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a step of a conversion that lead to a later one, or out of the steps into what runs them."""
    found = []
    for name, targets in sorted(edges.items()):
        own = step(name)
        for target in sorted(targets) if own is not None else ():
            inside, place = target.startswith("pilon_compress.convert."), step(target)
            if own is not None and inside and (place is None or place < own):
                found.append(f"{name} imports {target}")
    return found


def test_inside_a_conversion_imports_run_one_way(edges):
    found = climbing(edges)
    assert not found, "\n".join(["sharing imports allocate, that solve, that calibrate, see CONVERT:", *found])


def test_a_climb_inside_a_conversion_is_named():
    package = "pilon_compress.convert"
    edges = {f"{package}.solve.gptq": {f"{package}.sharing.joint_fit", f"{package}.calibrate.damping"}}
    edges |= {f"{package}.allocate.budget": {f"{package}.pipeline", f"{package}.plan", "pilon_compress.nn.bands"}}
    assert climbing(edges) == [
        f"{package}.allocate.budget imports {package}.pipeline",
        f"{package}.solve.gptq imports {package}.sharing.joint_fit",
    ]


def test_no_circle():
    found = circles({name: targets - {"pilon_compress"} for name, targets in graph(types=False).items()})
    assert not found, "\n".join(found)


def test_the_core_does_not_import_research(edges):
    found = [
        f"{name} imports {target}"
        for name, targets in sorted(edges.items())
        for target in sorted(targets)
        if room(target) == "research" and room(name) != "research"
    ]
    assert not found, "\n".join(["a recipe names research, which is bound then:", *found])


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "nn.bank",
            "from pilon_compress.optimize.loop import train",
            "nn.bank (nn) imports pilon_compress.optimize.loop",
        ),
        (
            "optimize.loop",
            "import pilon_compress.research.original.rates",
            "imports pilon_compress.research.original.rates",
        ),
        ("kernels.cpu", "def f():\n    from pilon_compress.config import ratio", "(kernels) imports"),
        ("io.disk", "from ..models import files", "(io) imports pilon_compress.models.files (models)"),
    ],
)
def test_an_upward_import_is_named(name, line, message):
    known = modules()
    name = f"pilon_compress.{name}"
    (found,) = upward({name: set(imported(name, known[name], known, line))})
    assert message in found


def test_a_circle_is_named():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b imports c imports b"]
