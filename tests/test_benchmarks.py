"""The GPU measurements run from a bare checkout, every arm of them, before anybody takes them to a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUEUE = (ROOT / "benchmarks/gpu.md").read_text()
LOOP = "import json, sys, train\nfor arm in json.loads(sys.argv[1]): train.main([arm, f'out/{arm}', '--smoke'])"
KERNELS = "import kernels\nfor arm in kernels.ARMS: kernels.main([arm, '--smoke'])"


def run_bare(script, argument, folder):
    """The JSON lines that a script prints without an install: with plain paths no editable one is active."""
    paths = (ROOT, ROOT / "benchmarks", *(path for path in sys.path if path.endswith("site-packages")))
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, argument],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_every_row_of_the_queue_runs_without_an_install(tmp_path):
    rows = re.findall(r"^\|[^|]*\| `(\S+) (out/\S+)[^`]*` \|", QUEUE, re.MULTILINE)
    arms = sorted({arm for arm, _ in rows})
    assert len(rows) >= 8 and len({output for _, output in rows}) == len(rows)
    results = run_bare(LOOP, json.dumps(arms), tmp_path)
    assert [result["arm"] for result in results] == arms
    assert all(result["validation perplexity"] < 512 for result in results)
    assert all((result["FFN stored ÷ dense"] == 1) == (result["arm"] == "dense") for result in results)


@pytest.mark.usefixtures("triton")
def test_the_kernels_are_measured_without_an_install_and_found_exact(tmp_path):
    results = run_bare(KERNELS, "", tmp_path)
    rows = re.findall(r"^\|[^|]*\| `(\w+)` \|", QUEUE, re.MULTILINE)
    assert rows == [result["arm"] for result in results]
    ceilings, exact, blocks = results
    assert "read 1 MB, again and again" in ceilings
    found = {name: value for name, value in exact.items() if ": " in name}
    assert {name.split(", ")[-1] for name in found if "relu2" in name} == {"2 launches", "4 launches", "many launches"}
    assert all(value.startswith("0 of ") for name, value in found.items() if "silu" not in name)
    assert {name.split(": ")[1] for name in found if "packed" in name} == {"composed", "matrix", "8 bits"}
    assert exact["packed layers are computed as"] == "BankWords, MatrixWords"
    assert any("ternary, 2 launches" in name for name in blocks)
