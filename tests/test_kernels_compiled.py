"""The Triton kernels compiled for a GPU that is not there: what the machine code holds, and what torch traces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("triton")


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Return the output of compile_kernels.py: a JSON line per kernel, and lines of what torch traces."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_compiled_for_a_hopper_gpu(offline):
    built = [line for line in offline if "kernel" in line]
    gemvs = {"latent", "output", "hidden", "front"}
    others = {"tile", "unpack", "quantise_rows", "quantise_latents", "quantise_hidden"}
    assert {line["kernel"] for line in built} == gemvs | others
    for line in built:
        assert line["STACK"] == line["LOCAL"] == line["STL"] == line["LDL"] == 0, line  # no spills
        assert line["fused"] == 0, line  # no multiplication was fused with an addition
        if line["kernel"] in gemvs:
            assert line["IDP"] >= 32, line
        if line["kernel"] == "tile":
            assert line["IMMA" if line["given"]["BM"] == 16 else "IGMMA"] >= 4, line
    assert {line["given"]["BM"] for line in built if line["kernel"] == "tile"} == {16, 64}


def test_torch_sees_the_kernels_inside_the_operators_and_what_they_write(offline):
    traced = [(line["traced"], line["writes"]) for line in offline if "traced" in line]
    assert traced == [
        ("front", ["scratch", "scales", "sums", "parts"]),
        ("output", ["codes", "out"]),
        ("latent", ["codes", "scales", "sums", "out"]),
        ("output", ["codes", "out"]),
        ("latent", ["codes", "scales", "sums", "out"]),
    ]
