"""Check `import pilon_compress`: every public name is there in any order of imports, and torch is not loaded."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pilon_compress

CALLS = [
    "compress",
    "save",
    "load",
    "heal",
    "train",
    "evaluate",
    "compare",
    "export",
    "inspect",
    "benchmark",
    "convert_model",
]


def test_every_public_name_resolves():
    for room in ("evaluate.evaluate", "train.pipeline", "compare.run", "export.run", "convert.pipeline"):
        import_module(f"pilon_compress.{room}")  # a room must not hide the call of its name
    for name in pilon_compress.__all__:
        assert getattr(pilon_compress, name) is not None
    for name in CALLS:
        assert getattr(pilon_compress, name).__module__.startswith("pilon_compress.api."), name
    assert set(dir(pilon_compress)) == set(pilon_compress.__all__) and set(CALLS) < set(pilon_compress.__all__)


def test_type_checkers_see_the_names_that_there_are():
    tree = ast.parse(Path(pilon_compress.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"pilon_compress.{module}" for name, module in pilon_compress._PUBLIC.items()}


def test_importing_the_package_loads_no_torch():
    code = "import sys, pilon_compress; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_calls_keep_their_names_where_transformers_was_imported_first():
    code = (
        "import transformers.quantizers.auto, pilon_compress as pc; print(callable(pc.export), callable(pc.evaluate))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
