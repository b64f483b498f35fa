"""The benchmark as a shell sees it: which figures there are, that they hang together, and what is refused."""

import json
from collections.abc import Mapping

import pytest
import torch
from typer.testing import CliRunner

from pilon_compress.bench import block_variants
from pilon_compress.bench.model_variants import VARIANTS
from pilon_compress.bench.timing import Times
from pilon_compress.errors import BadInput
from pilon_compress.export.save import save_model
from pilon_compress.kernels import cpu, dispatch
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.specs import BankSpec, DenseSpec, ProjectionSpec

BLOCK = {"dense_bf16", "dense_int8", "dense_ternary", "pilon_fp32", "pilon_bf16", "pilon_int8", "pilon_ternary"}


def hang_together(variants: Mapping[str, Mapping[str, float]]) -> None:
    for name, entry in variants.items():
        low, high = entry["spread"]
        assert 0 < low <= entry["speedup"] <= high, name
        assert 0 < entry["least_seconds"] <= entry["seconds"], name
    assert variants["dense_fp32"]["speedup"] == 1


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A tiny Llama whose first two layers share banks of rank 16, with a dense matrix among them."""
    model = tiny.tiny_model("llama")
    names = [f"layers.{layer}.mlp.{role}_proj" for layer in (0, 1) for role in ("gate", "up", "down")]
    banks = {f"band0.{role}": BankSpec(32, 64, 3, 16) for role in ("gate", "up")}
    banks["band0.down"] = BankSpec(64, 32, 3, 16)
    taken = {name: ProjectionSpec(f"band0.{name.split('.')[3][:-5]}", 2, False) for name in names[:-1]}
    layout = Layout(banks, taken, {names[-1]: DenseSpec(64, 32, False)})
    initialise(install(model, layout), 0.05, torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("bench") / "pilon"
    path.mkdir()
    save_model(model, tiny.tiny_tokenizer(), path, torch.float32)
    return path


def test_a_block_is_timed_in_every_form_without_a_model(cli, tmp_path):
    plot = tmp_path / "speedups.svg"
    words = ["--ffn", "64x128", "--active-rank", "32", "--batch", "2", "--threads", "1", "--rounds", "3"]
    result = json.loads(cli("bench", *words, "--json", "--plot", plot).stdout)
    assert result["skipped"] == {}
    assert result["speedup"].keys() == result["spread"].keys() == BLOCK
    assert result["ffn"] == {
        **{"d": 64, "hidden": 128, "active": 32, "rank": 16, "top_k": 2},
        **{"gated": False, "activation": "relu2", "batch": 2},
    }
    assert result["threads"] == 1 and result["kernel"] == cpu.isas()[0]
    hang_together(result["variants"])
    sizes = {name: entry["bytes"] for name, entry in result["variants"].items()}
    assert sizes["dense_fp32"] == 2 * 64 * 128 * 4 == 2 * sizes["dense_bf16"]
    assert sizes["pilon_fp32"] == 2 * 32 * (64 + 128) * 4
    assert sizes["pilon_ternary"] < sizes["pilon_int8"] < sizes["pilon_bf16"]
    drawn = plot.read_text()
    assert drawn.startswith("<svg") and "Speedup" in drawn


def test_a_gated_block_and_a_choice_of_variants_as_a_table():
    from pilon_compress.cli.main import app

    words = "bench --ffn 64x128 --gated --top-k 3 --variants pilon_ternary --variants pilon_fp32 --rounds 2"
    printed = CliRunner().invoke(app, words.split()).stdout
    assert "FFN 64→128 gated, k·r 48, batch 1" in printed
    assert "pilon_ternary" in printed and "pilon_fp32" in printed and "dense_fp32" in printed
    assert "dense_bf16" not in printed


def test_a_model_is_timed_reading_and_decoding(cli, folder):
    result = json.loads(cli("bench", folder, "--context", 12, "--rounds", 2, "--threads", 1, "--json").stdout)
    assert result["skipped"] == {} and len(result["kernels"]) == 6
    assert set(result["kernels"].values()) == {"torch"}, "floats"
    for part in ("prefill", "decode"):
        assert result[part].keys() == VARIANTS.keys()
        hang_together(result[part])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "either a PILON folder"),
        ("{folder} --ffn 64x128", "either a PILON folder"),
        ("--ffn 64", "--ffn: must be WIDTHxHIDDEN, as in 768x3072"),
        ("--ffn 64x128 --active-rank 20", "--active-rank: must be a multiple of --rank 16"),
        ("--ffn 64x128 --active-rank 48 --top-k 2", "--top-k: of --rank 16 makes 32 components, not --active-rank"),
        ("--ffn 64x128 --activation tanh", "--activation: must be 'relu2', 'relu'"),
        ("--ffn 64x128 --variants fastest", "no variant 'fastest'; there are dense_fp32"),
        ("--ffn 64x128 --plot speed.png", "must end in .svg"),
        ("{folder} --context 256", "must be from 1 to 255"),
        ("{dense}", "a dense model"),
    ],
)
def test_bad_input_is_refused(words, says, folder, tiny, tmp_path):
    from pilon_compress.cli.main import app

    tiny.save_tiny("gpt2", tmp_path / "dense")
    line = words.format(folder=folder, dense=tmp_path / "dense")
    refused = CliRunner().invoke(app, ["bench", *line.split()]).exception
    assert isinstance(refused, BadInput) and says in str(refused)


def test_ratios_are_taken_within_rounds():
    """A machine that slows down half-way does not change them."""
    times = Times({"dense_fp32": [2.0, 2.0, 20.0, 20.0], "pilon": [1.0, 1.0, 10.0, 8.0]})
    entry = times.summary("pilon", "dense_fp32").dump()
    assert entry["speedup"] == 2 and entry["spread"] == [2, pytest.approx(2.35)]
    assert entry["least_seconds"] == 1 and entry["seconds"] == 4.5


def test_folded_and_loaded_forms_compute_what_the_model_computes(folder):
    from pilon_compress.models.checkpoint import load_model

    pilon = load_model(str(folder), dtype="float32")
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        expected = pilon(ids).logits
        assert torch.equal(VARIANTS["pilon_loaded"](pilon)(ids).logits, expected)
        assert torch.allclose(VARIANTS["pilon_fp32"](pilon)(ids).logits, expected, atol=1e-4)
        for name in ("dense_ternary", "pilon_ternary", "pilon_ternary_int8"):
            assert VARIANTS[name](pilon)(ids).logits.shape == expected.shape
    assert len(list(projections(pilon))) == 5, "forms are copies"


@pytest.mark.parametrize("inputs", [64, 24])  # torch's own product crashes at 24, no multiple of 16
def test_int8_contenders_compute_the_block(inputs):
    torch.manual_seed(0)
    weight, x = torch.randn(48, inputs), torch.randn(32, inputs)
    exact = x @ weight.T
    for make, dtype in (
        (block_variants.weight_only_int8, torch.bfloat16),
        (block_variants.dynamic_int8, torch.float32),
    ):
        close = make(weight)(x.to(dtype)).float()
        assert (close - exact).norm() < 0.02 * exact.norm()


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", ["pilon_ternary", "dense_ternary"])
@pytest.mark.parametrize("gated", [False, True])
def test_on_a_gpu_ternary_contenders_run_its_kernels_and_compute_the_same(name, gated, monkeypatch):
    shape = block_variants.Shape(64, 256, 32, 16, gated, "relu2", 1)
    x, blocks = torch.randn(1, 64), []
    for triton_on in ({"cuda"}, {"cpu"}):
        monkeypatch.setattr(dispatch, "TRITON", triton_on)  # as if this were a GPU: in the interpreter (conftest.py)
        torch.manual_seed(0)
        blocks.append(block_variants.VARIANTS[name](shape, torch.device("cpu")))
    here, there = blocks
    assert torch.equal(there.run(x), here.run(x))
    assert there.dtype == torch.bfloat16 and there.run(x.bfloat16()).dtype == torch.bfloat16
    assert 0.9 < there.bytes / here.bytes < 1.1
    monkeypatch.setattr(dispatch, "_works", lambda device: False)
    with pytest.raises(block_variants.Unavailable, match="Triton kernels do not run here"):
        block_variants.VARIANTS[name](shape, torch.device("cpu"))


def test_what_a_device_lacks_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(cpu, "_loaded", False)
    shape = block_variants.Shape(64, 128, 32, 16, False, "relu2", 1)
    with pytest.raises(block_variants.Unavailable, match="unavailable"):
        block_variants.pilon_ternary(shape, torch.device("cpu"))
