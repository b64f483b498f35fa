"""`bench --against llama.cpp` as a shell sees it: figures of both sides, their ratios, and what is refused."""

import json
import math
import os
import subprocess
import sys
from statistics import median

import pytest
from typer.testing import CliRunner

from pilon_compress.bench import against, llama_cpp_files
from pilon_compress.errors import BadInput
from pilon_compress.export.llama_cpp import runtime, tensors
from pilon_compress.results.against import RuntimeFigures
from tests.test_stock_formats import make

needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp (xllamacpp) is not installed")
FIGURES = ("decode", "read128", "first_token", "memory", "file")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return make(tmp_path_factory.mktemp("against"), tiny, "llama", uniform_width=True, multiple_of=32)


def bench(*words):
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pilon_compress.cli", "bench", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=alone)


@needs_llama_cpp
def test_the_command_line_prints_ratios_of_every_figure(folder, tmp_path):
    plot = tmp_path / "ratios.svg"
    words = ["--against", "llama.cpp:q4_0", "--threads", 1, "--rounds", 1, "--context", 16, "--plot", plot, "--json"]
    done = bench(folder, *words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    found = told["against"]
    assert found["runtime"] == "llama.cpp" and found["types"] == ["q4_0"] and told["threads"] == 1
    assert "256 positions" in told["skipped"]["read512"] and "read512" not in found
    ours, theirs = found["ours"], found["theirs"]["q4_0"]
    for figure in FIGURES:
        own, other = ours[figure], theirs[figure]
        own, other = (own, other) if isinstance(own, list) else ([own], [other])
        ratios = [their / mine for their, mine in zip(other, own, strict=True)]
        assert len(ratios) == 1
        assert all(math.isfinite(value) and value > 0 for value in (*own, *other))
        assert found[figure] == pytest.approx(median(ratios))
        assert found["spread"][figure] == pytest.approx([min(ratios), max(ratios)])
    weights = (folder / "model.safetensors").stat().st_size
    assert weights < ours["file"] < weights + 1e5
    assert ours["text"] and theirs["text"]
    assert plot.read_text().startswith("<svg") and "llama.cpp ÷ PILON" in plot.read_text()


def test_several_types_have_an_entry_each():
    told = {"decode": [2.0, 4.0], "first_token": [1.0], "memory": [100], "file": 10, "text": "a"}
    ours = RuntimeFigures(**told)
    theirs = RuntimeFigures(**{**told, "decode": [3.0, 2.0], "file": 5})
    about = {"dense": "d", "starts": 1}
    two = against._compared(ours, {"q4_0": theirs, "q8_0": ours}, **about).dump()
    assert two["decode"] == {"q4_0": 1.0, "q8_0": 1.0} and two["spread"]["decode"]["q4_0"] == [0.5, 1.5]
    one = against._compared(ours, {"q4_0": theirs}, **about).dump()
    assert one["decode"] == 1.0 and one["spread"]["decode"] == [0.5, 1.5]
    assert one["file"] == 0.5 and one["spread"]["file"] == [0.5, 0.5] and "read128" not in one


@needs_llama_cpp
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{folder} --against llama.cpp:q9_9", "no llama.cpp file of type 'q9_9' is made here: take f32, f16"),
        ("{folder} --against llama.cpp:", "--against: must be llama.cpp, or llama.cpp:TYPES"),
        ("{folder} --against llama.cpp:q4_0,q4_0", "--against: names a type twice"),
        ("{folder} --against ollama", "--against: must be llama.cpp"),
        ("{folder} --against llama.cpp --batch 2", "--batch: has no effect with --against"),
        ("{folder} --against llama.cpp --variants dense_bf16", "--variants: has no effect with --against"),
        ("--ffn 64x128 --against llama.cpp", "--ffn: has no effect with --against"),
        ("{folder} --dense {dense}", "--dense names the model of another runtime"),
        ("{folder} --against llama.cpp --device cuda", "timed on the CPU alone"),
        ("{folder} --against llama.cpp --context 250", "--context must be at most 207"),
        ("{folder} --against llama.cpp --dense {folder}", "already a PILON model"),
        ("{dense} --against llama.cpp", "a dense model"),
        ("{folder} --against llama.cpp:tq2_0", "can be tq2_0, its rows do not fill the blocks"),
    ],
)
def test_bad_input_is_refused(words, says, folder):
    from pilon_compress.cli.main import app

    line = words.format(folder=folder, dense=folder.parent / "dense")
    refused = CliRunner().invoke(app, ["bench", *line.split()]).exception
    assert isinstance(refused, BadInput) and says in str(refused)


def test_without_llama_cpp_one_line_says_what_to_install(folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nf = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'xllamacpp' else f(name, *a)\n"
    )
    command = [sys.executable, "-m", "pilon_compress.cli", "bench", str(folder), "--against", "llama.cpp"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "pip install 'pilon-compress[llama-cpp]'" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_ternary_types_fall_back_as_in_llama_cpp():
    kinds = {
        ("blk.0.ffn_down.weight", (64, 512), "tq2_0"): "TQ2_0",
        ("blk.0.ffn_up.weight", (64, 576), "tq1_0"): "Q4_0",
        ("token_embd.weight", (300, 576), "tq2_0"): "Q8_0",
        ("token_embd.weight", (300, 512), "tq2_0"): "Q6_K",
    }
    assert {asked: tensors.kind_of(asked[0], asked[1], asked[2], 3) for asked in kinds} == kinds


@needs_llama_cpp
def test_wide_rows_become_ternary_files_that_llama_cpp_runs(tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense", intermediate_size=256)
    ((kind, path),) = llama_cpp_files.write(str(tmp_path / "dense"), ["tq2_0"], tmp_path)
    assert kind == "tq2_0" and len(runtime.Runtime(path).complete([5, 6, 7], 4)["tokens"]) == 4
