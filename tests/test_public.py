"""Check `import pilon_compress`: every public name is there in any order of imports, and torch is not loaded."""

import subprocess
import sys
from importlib import import_module

import pilon_compress


def test_every_public_name_resolves():
    pipeline = import_module("pilon_compress.convert.pipeline")  # the room `convert` must not hide a public name
    missing = [
        name for name in pilon_compress.__all__ if not callable(getattr(pilon_compress, name)) and name[0] != "_"
    ]
    assert not missing
    assert pilon_compress.convert_model is pipeline.convert
    room = import_module("pilon_compress.evaluate.evaluate")
    assert pilon_compress.evaluate is room.evaluate


def test_importing_the_package_loads_no_torch():
    code = "import sys, pilon_compress; print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
