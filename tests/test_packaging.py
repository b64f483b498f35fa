"""Check what is installed from wheel, sdist and checkout: everything below `pilon_compress`, nothing beside it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"pilon_compress": "pilon_compress", "cli": "pilon_compress/cli", "recipes": "pilon_compress/recipes"}
SHIPPED = {".py", ".typed", ".j2", ".yaml", ".json", ".cpp", ".h"}
LONGEST = 400  # lines

PROBE = """
import sys
from importlib.util import find_spec
sys.path[:0] = sys.argv[1:]
import pilon_compress.cli.main, pilon_compress.recipes, pilon_compress.config.conversion
print(pilon_compress.__file__, pilon_compress.cli.__file__, pilon_compress.recipes.__file__, sep="\\n")
print([name for name in ("cli", "recipes") if find_spec(name)])
print(pilon_compress.config.conversion.load("quickstart").method)
"""


def run(*command: object, cwd: Path) -> str:
    """stdout of a command that must succeed; `-I` keeps the checkout and PYTHONPATH out of a Python's sight."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The checkout without what a build or an editable install may have left in it."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def dist(tree) -> Path:
    """An sdist of the tree, and the wheel built from that sdist."""
    run("-m", "build", "--no-isolation", "--outdir", tree.parent / "dist", tree, cwd=tree.parent)
    return tree.parent / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    return next(dist.glob("*.whl"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(files: dict[str, bytes], name: str) -> str:
    return next(text.decode() for path, text in files.items() if path.endswith(f".dist-info/{name}"))


def test_the_wheel_holds_every_module_recipe_and_template_and_nothing_else(tree, wheel):
    installed = {name: text for name, text in contents(wheel).items() if ".dist-info/" not in name}
    expected = {
        str(Path(target) / path.relative_to(tree / room)): path.read_bytes()
        for room, target in ROOMS.items()
        for path in (tree / room).rglob("*")
        if path.suffix in SHIPPED
    }
    assert installed.keys() == expected.keys()
    assert installed == expected
    assert {"pilon_compress/recipes/quickstart.yaml", "pilon_compress/cli/main.py"} <= installed.keys()


def test_the_wheel_says_who_made_it_and_what_it_runs(wheel):
    files = contents(wheel)
    assert "pilon-compress = pilon_compress.cli.main:main" in metadata(files, "entry_points.txt")
    about = metadata(files, "METADATA")
    assert "License-Expression: MIT" in about and "Name: pilon-compress" in about
    assert "MIT License" in metadata(files, "licenses/LICENSE")
    pinned = [line for line in about.splitlines() if line.startswith("Requires-Dist:") and "==" in line.split(";")[0]]
    assert not pinned, "exact versions belong in constraints.txt"


def test_the_sdist_builds_the_same_wheel_as_the_checkout(tree, wheel, tmp_path):
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, tree, cwd=tmp_path)
    assert contents(next(tmp_path.glob("*.whl"))) == contents(wheel)


def test_the_wheel_works_and_makes_no_bare_cli_or_recipes_importable(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    *homes, bare, method = run("-I", "-c", PROBE, tmp_path / "site", cwd=tmp_path).splitlines()
    assert all(Path(home).is_relative_to(tmp_path / "site" / "pilon_compress") for home in homes)
    assert (bare, method) == ("[]", "pilon")


def test_the_editable_install_reads_the_checkout_and_makes_no_bare_cli_or_recipes_importable(tmp_path):
    *homes, bare, method = run("-I", "-c", PROBE, cwd=tmp_path).splitlines()
    assert [Path(home) for home in homes] == [ROOT / room / "__init__.py" for room in ROOMS]
    assert (bare, method) == ("[]", "pilon")


def test_no_file_is_longer_than_a_reader_can_hold():
    sources = [path for room in (*ROOMS, "tests", "examples") for path in (ROOT / room).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in sources}
    assert len(lengths) > 20
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}
