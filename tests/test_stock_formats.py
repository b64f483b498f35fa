"""Models that lost neurons alone, as stock formats have them: one width for all layers, or a width for each."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from pilon_compress.config import conversion
from pilon_compress.convert.pipeline import convert
from pilon_compress.errors import BadInput
from pilon_compress.export.deci import deci_config, read_deci, width_of
from pilon_compress.export.run import export, targets
from pilon_compress.export.verify import ExportFailed, difference
from tests.test_elastic import IDS, TEXT

HEADS = {"bert": "base"}


def make(place, tiny, family, **budget):
    """Convert a tiny model of that family to `place/out`; returns the folder."""
    tiny.save_tiny(family, place / "dense", **({"heads": HEADS[family]} if family in HEADS else {}))
    (place / "text.txt").write_text(TEXT)
    calibration = {"data": str(place / "text.txt"), "samples": 16, "sequence_length": 32, "batch_size": 4}
    data = {"model": str(place / "dense"), "calibration": calibration, "evaluation": {"data": "none"}}
    convert(conversion.build(data | {"budget": {"ffn_ratio": 0.6, **budget}}), place / "out")
    return place / "out"


@pytest.fixture(scope="module")
def uneven(tiny, tmp_path_factory):
    """A Llama whose layers have widths of their own, its matrices whole."""
    return make(tmp_path_factory.mktemp("uneven"), tiny, "llama", whole_matrices=True)


def states(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS % 256)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma", "bert"])
def test_a_uniform_width_is_a_stock_checkpoint_that_transformers_loads_alone(tiny, tmp_path, family):
    folder = make(tmp_path, tiny, family, uniform_width=True)
    found = export(str(folder), tmp_path / "native", "native").dump()
    assert found["max_logit_difference"] < 1e-4
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert "quantization_config" not in config
    kind = "AutoModel" if family == "bert" else "AutoModelForCausalLM"
    code = (
        f"from transformers import {kind} as A; m = A.from_pretrained('native'); import sys; "
        "print(sum(p.numel() for p in m.parameters())); assert 'pilon_compress' not in sys.modules"
    )
    alone = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-S", "-c", "import site; site.main();" + code], cwd=tmp_path, env=alone,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    load = AutoModel if family == "bert" else AutoModelForCausalLM
    dense, ours, native = (load.from_pretrained(tmp_path / name) for name in ("dense", "out", "native"))
    assert int(done.stdout.split()[-1]) < sum(p.numel() for p in dense.parameters())
    torch.testing.assert_close(states(native), states(ours), atol=1e-4, rtol=1e-4)


def test_widths_are_multiples_of_what_is_asked_and_alike(tiny, tmp_path):
    folder = make(tmp_path, tiny, "llama", uniform_width=True, multiple_of=32)
    kept = json.loads((folder / "config.json").read_text())["quantization_config"]["layout"]["kept"]
    widths = {one["d_in"] for name, one in kept.items() if name.endswith("down_proj")}
    assert len(widths) == 1 and widths.pop() % 32 == 0


def test_other_widths_are_exact_in_deci_form_and_no_stock_config(uneven, tmp_path):
    found = export(str(uneven), tmp_path / "deci", "deci").dump()
    config = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == found["widths"]
    assert len(set(found["widths"])) > 1 and found["max_logit_difference"] < 1e-4 and found["readers"] == "vLLM"
    ours = AutoModelForCausalLM.from_pretrained(uneven)
    torch.testing.assert_close(states(read_deci(tmp_path / "deci")), states(ours), atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match="layers of different widths, .* --uniform-width"):
        export(str(uneven), tmp_path / "native", "native")
    assert not (tmp_path / "native").exists()


def test_decis_config_loads_by_its_own_code(uneven, tmp_path):
    found = export(str(uneven), tmp_path / "deci", "deci").dump()
    code = (
        "from transformers import AutoConfig; c = AutoConfig.from_pretrained('deci', trust_remote_code=True); "
        "print([b.ffn.intermediate_size for b in c.block_configs], c.to_dict()['block_configs'][0]['attention'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{found['widths']} {{'n_heads_in_group'")


def test_widths_in_multiples_of_256_are_written_as_every_reader_takes_them():
    config = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    widths = [256, 768, 1280, 1536]
    forms = deci_config(config, widths)["block_configs"]
    assert [width_of(one["ffn"], 576) for one in forms] == widths
    assert all("intermediate_size" not in one["ffn"] for one in forms)
    assert forms[0]["attention"]["n_heads_in_group"] == 3


def test_the_list_says_which_stock_form_takes_a_model(uneven):
    said = {one.target: one.reason for one in targets(str(uneven))}
    assert said["deci"] == "" and said["native"].startswith("has layers of different widths")


def test_an_export_that_computes_something_else_is_refused(uneven):
    model = AutoModelForCausalLM.from_pretrained(uneven)
    with pytest.raises(ExportFailed, match="computes something else, by .*: nothing is written"):
        difference(model, torch.zeros(2, 48, model.config.vocab_size), "native")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "budget.multiple_of=32"], "budget.multiple_of: has no effect with budget.whole_matrices"),
        (["--uniform-width", "--share", "always"], "--share: shares factors of matrices"),
        (["--uniform-width", "--rank-multiple", "16"], "--rank-multiple: has no effect"),
        (["--uniform-width", "--multiple-of", "256"], "no multiple of 256: lower --multiple-of"),
        (["--uniform-width", "--multiple-of", "64"], "no width is within the budget: 64 neurons in every layer are"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(cli, uneven, words, said):
    asked = ("convert", "dense", "--ffn-ratio", "0.6", "--calibration", "text.txt", "--samples", "16")
    done = cli(*asked, "--sequence-length", "32", "-o", "other", *words, cwd=uneven.parent, code=2)
    assert said in done.stderr.strip().splitlines()[-1]
    assert not (uneven.parent / "other").exists()
