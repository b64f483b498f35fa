"""The compiled kernel: taken from the cache, made anew for changed sources; without a compiler plain torch instead."""

import json
import shutil
from pathlib import Path

import pytest

from pilon_compress.kernels import build, cpu

CHILD = """
import json, sys, torch
from pilon_compress.kernels import cpu
from pilon_compress.nn.int8 import Int8Product
torch.manual_seed(0)
digits = torch.randint(-1, 2, (2, 64, 32), dtype=torch.int8)
p = cpu.CpuProjection(cpu.tiles(digits, digits.mT.contiguous()), torch.rand(64), torch.tensor([1, 0]), group=16)
x = torch.randn(3, 64)
rows = digits[0].T.contiguous()
ys = [cpu.ffn(x, p, p), cpu.ffn(x, p, p, p, "silu"), Int8Product()(x, rows, torch.rand(32), None)]
print(json.dumps([cpu.available(), [y.tolist() for y in ys]]))
"""


@pytest.fixture
def child(bare):
    def child(**environment: str) -> tuple[bool, list[object], str]:
        done = bare.python(CHILD, **environment)
        return *json.loads(done.stdout), done.stderr

    return child


def test_without_a_compiler_the_same_numbers_come_and_one_warning_says_why(child, tmp_path):
    with_kernel = child()[1]
    for environment, reason in (
        ({"CXX": "/nowhere/c++", "PILON_CACHE": str(tmp_path / "cache")}, "cannot run /nowhere/c++"),
        ({"CXX": "false", "PILON_CACHE": str(tmp_path / "cache")}, "false failed"),
        ({"PILON_KERNELS": "0"}, "PILON_KERNELS=0"),
    ):
        available, numbers, said = child(**environment)
        assert not available and numbers == with_kernel
        assert said.count("plain torch") == 1 and reason in said, said
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
def test_a_library_in_the_cache_is_used_and_a_changed_source_asks_for_another(child, tmp_path, monkeypatch):
    made = build.library()
    (tmp_path / "kernels").mkdir()
    shutil.copy(made, tmp_path / "kernels")
    assert child(PILON_CACHE=str(tmp_path), CXX="false")[0], "compiled again instead of taken from the cache"
    before = build.key()
    changed = tmp_path / "products.cpp"
    changed.write_text(Path(build.SOURCES[0]).read_text() + "\n")
    monkeypatch.setattr(build, "SOURCES", (changed, *build.SOURCES[1:]))
    assert build.key() != before
