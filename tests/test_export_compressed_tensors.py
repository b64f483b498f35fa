"""Integer matrices in the format of compressed-tensors, as transformers reads them without us."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from pilon_compress.config import conversion
from pilon_compress.convert.pipeline import convert
from pilon_compress.errors import BadInput
from pilon_compress.export.llama_cpp import runtime
from pilon_compress.export.run import export, targets
from pilon_compress.export.verify import ExportFailed
from tests.test_elastic import TEXT

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def make(place, tiny, family="llama", kind="int4", hidden=64, **budget):
    """Convert a tiny model to integers at `place/out`; returns the folder."""
    tiny.save_tiny(family, place / "dense", hidden_size=hidden, intermediate_size=256)
    (place / "text.txt").write_text(TEXT)
    calibration = {"data": str(place / "text.txt"), "samples": 16, "sequence_length": 32, "batch_size": 4}
    data = {"model": str(place / "dense"), "calibration": calibration, "evaluation": {"data": "none"}}
    settings = {"ffn_ratio": 0.6, "uniform_width": True, "multiple_of": 64, **budget}
    convert(conversion.build(data | {"budget": settings, "form": {"bank_dtype": kind}}), place / "out")
    return place / "out"


@pytest.mark.parametrize(("family", "kind", "bits", "group"), [("llama", "int4", 4, 64), ("qwen2", "int8", 8, 0)])
def test_transformers_alone_computes_with_our_integers(tiny, tmp_path, family, kind, bits, group):
    folder = make(tmp_path, tiny, family, kind)
    found = export(str(folder), tmp_path / "made", "compressed-tensors").dump()
    assert (found["bits"], found["group"]) == (bits, group) and found["matrices"] == 9
    assert found["max_logit_difference"] < 1e-4
    code = (
        "from transformers import AutoModelForCausalLM as A; import sys, torch; m = A.from_pretrained('made'); "
        "torch.save(m(torch.arange(40)[None]).logits, 'logits.pt'); assert 'pilon_compress' not in sys.modules"
    )
    words = [sys.executable, "-S", "-c", "import site; site.main();" + code]
    alone = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(words, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = ours(torch.arange(40)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-4, rtol=1e-4)
    dense = export(str(folder), tmp_path / "dense-out", "native")
    assert dense and found["bytes"] < sum(p.stat().st_size for p in (tmp_path / "dense-out").glob("*.safetensors"))


@pytest.mark.skipif(not runtime.available(), reason="llama.cpp (xllamacpp) is not installed")
@pytest.mark.parametrize(("kind", "form"), [("int4", "q4_0"), ("int8", "q8_0")])
def test_a_gguf_file_keeps_the_integers_of_the_conversion(tiny, tmp_path, kind, form):
    import gguf

    folder = make(tmp_path, tiny, kind=kind)
    found = export(str(folder), tmp_path / "made", "gguf").dump()
    assert found["type"] == form and found["integers_kept"] == 9
    dense = export(str(folder), tmp_path / "plain", "native")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).state_dict()
    read = {one.name: one for one in gguf.GGUFReader(tmp_path / "made" / found["file"]).tensors}
    down = read["blk.1.ffn_down.weight"]
    stored = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type).copy())
    torch.testing.assert_close(stored, plain["model.layers.1.mlp.down_proj.weight"], atol=0, rtol=0)
    assert dense and found["bytes"] > 0


def test_the_folder_is_as_readable_as_others_and_nothing_is_shown(tiny, tmp_path, capfd):
    folder = make(tmp_path, tiny)
    capfd.readouterr()
    export(str(folder), tmp_path / "made", "compressed-tensors")
    assert "Decompressing" not in capfd.readouterr().err
    weights, config = (tmp_path / "made" / name for name in ("model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode


def test_a_wrong_order_of_numbers_is_not_kept(tiny, tmp_path, monkeypatch):
    from pilon_compress.export import compressed_tensors

    folder, true = make(tmp_path, tiny), compressed_tensors.packed_tensors

    def reversed_scales(layer):
        found = true(layer)
        return {**found, "weight_scale": found["weight_scale"].flip(0).contiguous()}

    monkeypatch.setattr(compressed_tensors, "packed_tensors", reversed_scales)
    with pytest.raises(ExportFailed, match="computes something else"):
        export(str(folder), tmp_path / "made", "compressed-tensors")
    assert not (tmp_path / "made").exists()


def test_other_models_are_refused_and_told_why(tiny, tmp_path):
    folder = make(tmp_path, tiny, multiple_of=16)
    rows = {one.target: one.reason for one in targets(str(folder))}
    assert "no multiple of its groups of 64" in rows["compressed-tensors"]
    with pytest.raises(BadInput, match="--multiple-of 64"):
        export(str(folder), tmp_path / "made", "compressed-tensors")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
