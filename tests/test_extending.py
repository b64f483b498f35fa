"""The worked examples of docs/extending: each adds something by one file, which every command then knows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pilon_compress.compare import run as comparing
from pilon_compress.compare.baselines.registry import BASELINES
from pilon_compress.config import conversion, training
from pilon_compress.convert.pipeline import convert
from pilon_compress.errors import BadInput
from pilon_compress.export.run import export
from pilon_compress.models import checkpoint
from pilon_compress.models.architectures.registry import ARCHITECTURES
from pilon_compress.models.base_architectures import config_for
from pilon_compress.models.families import find_sites
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.layout import Layout
from pilon_compress.plugins import import_file
from pilon_compress.train.pipeline import train_model

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "extending"
TEXT = {"data": "stdlib:topics", "samples": 8, "sequence_length": 32}
SMALL = ["host.hidden_size=32", "host.num_hidden_layers=2", "host.intermediate_size=96", "schedule.tokens=4096"]


@pytest.fixture(scope="module")
def architecture():
    """Imported when a test runs, not when tests are collected: others iterate over the registries then."""
    return import_file(EXAMPLES / "base_architecture.py")


@pytest.fixture(scope="module")
def dense(architecture, tiny, tmp_path_factory):
    """A folder with a random model of the architecture, dense."""
    folder = tmp_path_factory.mktemp("relu") / "dense"
    host = training.load("smoke", [*SMALL, "host.family=relu-llama", "host.vocab_size=264"]).host
    torch.manual_seed(0)
    checkpoint.build(config_for(host, 64, 2)).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_base_architecture_is_trained_from_scratch(architecture, tmp_path):
    assert {"arcee", "llama", "relu-llama"} <= {*ARCHITECTURES}
    result = train_model(training.load("smoke", [*SMALL, "host.family=relu-llama"]), tmp_path / "out", quiet=True)
    assert 0.4 < result.ffn.stored_ratio <= 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is architecture.ReluLlamaForCausalLM
    assert type(model.model.layers[1].mlp.widen).__name__ == "ComposedLinear"
    with pytest.raises(BadInput, match="no base architecture 'relu-lama'; did you mean relu-llama\\?"):
        train_model(training.load("smoke", [*SMALL, "host.family=relu-lama"]), tmp_path / "none", quiet=True)


def test_a_base_architecture_is_converted_and_exported(architecture, dense, tmp_path):
    asked = {"model": str(dense), "budget": {"ffn_ratio": 0.5}, "calibration": TEXT, "evaluation": {"data": "none"}}
    report = convert(conversion.build(asked), tmp_path / "half")
    assert 0.4 < report.ffn.stored_ratio <= 0.5
    assert {site.role for site in find_sites(checkpoint.load_model(str(dense)))} == {"up", "down"}
    half = checkpoint.load_model(str(tmp_path / "half"))
    export(str(tmp_path / "half"), tmp_path / "plain", "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=half.dtype)
    ids = torch.arange(1, 33)[None]
    assert torch.allclose(plain(input_ids=ids).logits, half(input_ids=ids).logits, atol=1e-4)
    with pytest.raises(BadInput, match="its code does not travel"):
        export(str(tmp_path / "half"), tmp_path / "own", "self-contained")


def test_a_baseline_is_compared_at_equal_numbers(tiny, tmp_path):
    import_file(EXAMPLES / "baseline.py")
    tiny.save_tiny("gpt2", tmp_path / "dense")
    settings = conversion.build({"model": str(tmp_path / "dense"), "calibration": TEXT, "evaluation": {"samples": 2}})
    asked = comparing.plan(settings, [0.5], ["magnitude", "svd"], 1)
    comparing.compare(asked, tmp_path / "out")
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    stored, size = (rows["magnitude"][key]["mean"] for key in ("stored_ratio", "bytes_ratio"))
    assert stored == pytest.approx(0.5, abs=1e-3) and size == pytest.approx(stored + 1 / 16, abs=2e-3), "a bit a place"
    assert rows["magnitude"]["mac_ratio"]["mean"] == 1 and rows["magnitude"]["whitened_loss"]["mean"] > 0
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "magnitude pruning" in page and "Han et al., 2015" in page
    assert BASELINES["magnitude"].planned(asked.base.sites, 1.0)[0] == sum(site.parameters for site in asked.base.sites)


def test_a_plug_in_named_in_the_environment_is_known_to_the_command(command_line, tiny, tmp_path):
    tiny.save_tiny("gpt2", tmp_path / "dense")
    words = ["compare", "dense", "--methods", "magnitude", "--ffn-ratio", "0.5", "--dry-run", "--json"]
    process = command_line.start(*words, cwd=tmp_path, PILON_PLUGINS=str(EXAMPLES / "baseline.py"))
    planned = json.loads(command_line.finish(process).stdout)["planned"]
    assert [row["method"] for row in planned] == ["magnitude"] and 0.49 < planned[0]["stored_ratio"] <= 0.5


@pytest.fixture(scope="module")
def float8(tiny, tmp_path_factory):
    """A folder with a tiny GPT-2, `dense`, and its conversion to 8-bit floats, `small`; the report of the latter."""
    import_file(EXAMPLES / "number_format.py")
    folder = tmp_path_factory.mktemp("float8")
    tiny.save_tiny("gpt2", folder / "dense")
    asked = {"model": str(folder / "dense"), "budget": {"ffn_ratio": 0.6}, "form": {"bank_dtype": "float8"}}
    report = convert(conversion.build({**asked, "calibration": TEXT, "evaluation": {"data": "none"}}), folder / "small")
    return folder, report


def test_a_number_format_is_converted_to_loaded_and_refused_where_it_is_damaged(float8, tiny, tmp_path):
    folder, report = float8
    parts = layout_of(AutoModelForCausalLM.from_pretrained(folder / "small"))
    assert parts.kinds == {"float8"}
    stored, size = report.ffn.stored_ratio, report.ffn.bytes_ratio
    assert 0.5 < stored <= 0.6 and 0.5 * stored < size < 0.62 * stored, "a byte a weight, and a scale per column"
    path = folder / "small" / "model.safetensors"
    tensors = load_file(path)
    codes = next(name for name, tensor in tensors.items() if tensor.dtype == torch.uint8)
    tensors[codes].flatten()[0] = 0x7F
    (tmp_path / "bad").mkdir()
    for file in (folder / "small").iterdir():
        if file.is_file() and file.name not in ("model.safetensors", "manifest.json"):
            (tmp_path / "bad" / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds bytes that are no number"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bad")


def test_a_number_format_is_exported_dense_and_with_its_own_code(bare, float8, tmp_path):
    folder, _ = float8
    ids = torch.arange(1, 33)[None]
    export(str(folder / "small"), tmp_path / "plain", "dense")
    small, plain = (AutoModelForCausalLM.from_pretrained(f).float() for f in (folder / "small", tmp_path / "plain"))
    with torch.no_grad():
        expected = small(input_ids=ids).logits
        assert (plain(input_ids=ids).logits - expected).norm() < 1e-2 * expected.norm()
    export(str(folder / "small"), tmp_path / "own", "self-contained")
    code = (
        "import sys, torch; sys.modules['pilon_compress'] = None; from transformers import AutoModelForCausalLM as M; "
        f"m = M.from_pretrained({str(tmp_path / 'own')!r}, trust_remote_code=True).float(); "
        "print(float(m(input_ids=torch.arange(1, 33)[None]).logits.double().sum()))"
    )
    done = bare.python(code, cwd=tmp_path)
    assert float(done.stdout.split()[-1]) == pytest.approx(float(expected.double().sum()), rel=1e-3, abs=1e-2)


def test_a_format_that_nobody_registered_is_refused(float8):
    folder, _ = float8
    config = json.loads((folder / "small" / "config.json").read_text())
    layout = config["quantization_config"]["layout"]
    for spec in (*layout["banks"].values(), *layout["kept"].values()):
        spec["quantization"] = "float4"
    with pytest.raises(ValueError, match="'float4' is not known: .*PILON_PLUGINS"):
        Layout.from_dict(layout)
    with pytest.raises(BadInput, match="bank_dtype 'float4' is none of auto, .*int8"):
        convert(conversion.build({"model": str(folder / "dense"), "form": {"bank_dtype": "float4"}}), folder / "none")
