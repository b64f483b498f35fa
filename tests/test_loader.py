"""Save, load, compute the same: for every family, every head, sharded or not; and refusals of what is incomplete."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from pilon_compress.config.budget import Budget
from pilon_compress.convert.allocate.uniform import make_plan
from pilon_compress.convert.plan import BankPlan, Plan, trimmed
from pilon_compress.export.dense import to_dense
from pilon_compress.export.run import export
from pilon_compress.export.save import save_model
from pilon_compress.models.families import FAMILIES, find_sites
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import dense_matrices, layout_of, projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import model_size

ENCODERS = ("bert", "roberta", "distilbert")
IDS = torch.arange(5, 25).reshape(2, 10)


def pilon(tiny, family, **config):
    """A random PILON model of the family, in float32, eval mode."""
    model = tiny.tiny_model(family, **config)
    plan = make_plan(find_sites(model), Budget(ffn_ratio=0.6), "pilon", "component")
    return initialise(install(model, plan.layout()), 0.05, torch.Generator().manual_seed(0)).eval()


def trimmed_pilon(tiny, family):
    """Return the layout with 40 of 64 neurons: dense ups in the first layer, downs in the second, all in the third.

    Dense matrices and banks compute at the smaller width.
    """
    model = tiny.tiny_model(family)
    plan = Plan(0.6, [[0], [1], [2]], [])
    for site in find_sites(model):
        small = trimmed(site, 40, 64)
        plan.host[site.name] = (site.d_in, site.d_out)
        if site.layer == 2 or (site.role == "down") == (site.layer == 1):
            plan.matrices.append(small)
        else:
            plan.banks.append(BankPlan(site.layer, site.role, (small,), 1, 9, 1))
    generator = torch.Generator().manual_seed(0)
    initialise(install(model, plan.layout()), 0.1, generator)
    with torch.no_grad():
        for _, matrix in dense_matrices(model):
            matrix.weight.normal_(0, 0.1, generator=generator)
            if matrix.bias is not None:
                matrix.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def researched(tiny, family):
    """Return the layout with a latent scale in every bank, and a norm before every down projection."""
    model = tiny.tiny_model(family)
    layout = make_plan(find_sites(model), Budget(ffn_ratio=0.6), "pilon", "component").layout()
    layout = layout.with_addition("original", "latent_scale", layout.banks)
    layout = layout.with_addition("bitnet", "sub_norm", [s.name for s in find_sites(model) if s.role == "down"])
    return initialise(install(model, layout), 0.05, torch.Generator().manual_seed(0)).eval()


def save(tiny, model, folder, **options):
    folder.mkdir(exist_ok=True)
    save_model(model, tiny.tiny_tokenizer(), folder, torch.float32, **options)
    return str(folder)


def output(model, ids=IDS):
    with torch.no_grad():
        result = model(input_ids=ids)
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_round_trip_is_bit_equal_for_every_family(tiny, tmp_path, family, shard):
    model = pilon(tiny, family)
    folder = save(tiny, model, tmp_path / "m", max_shard_size=shard)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard == "20KB")
    auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder)
    assert layout_of(loaded) == layout_of(model)
    assert torch.equal(output(loaded), output(model))
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(output(base), output(model.base_model))
    assert not hasattr(loaded, "hf_quantizer") and loaded.half().dtype == torch.float16


@pytest.mark.parametrize("family", FAMILIES)
def test_trimmed_and_kept_projections_survive_saving_and_export(tiny, tmp_path, family):
    model = trimmed_pilon(tiny, family)
    before, layout = output(model), layout_of(model)
    folder = save(tiny, model, tmp_path / "m")
    auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder)
    assert layout_of(loaded) == layout == Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert torch.equal(output(loaded), before)
    numbers = sum(tensor.numel() for tensor in load_file(f"{folder}/model.safetensors").values())
    assert model_size(layout, tiny.tiny_model(family)).stored == numbers, "what is counted is what the file holds"
    whole = save(tiny, to_dense(loaded), tmp_path / "dense")
    dense = auto.from_pretrained(whole)
    sizes = {name: p.numel() for name, p in tiny.tiny_model(family).named_parameters()}
    narrow = {name: p.numel() for name, p in dense.named_parameters()}  # all layers have lost as many neurons
    assert narrow.keys() == sizes.keys() and all(narrow[name] <= sizes[name] for name in sizes)
    assert sum(narrow.values()) < sum(sizes.values())
    torch.testing.assert_close(output(dense), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_sequence_classification_loads_the_same_file(tiny, tmp_path, family, shard):
    model = pilon(tiny, family)
    folder = save(tiny, model, tmp_path / "m", max_shard_size=shard)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    again = tmp_path / "classifier"
    save(tiny, classifier.eval(), again, max_shard_size=shard)
    reloaded = AutoModelForSequenceClassification.from_pretrained(str(again))
    assert output(reloaded).shape == (2, 3)
    assert torch.equal(output(reloaded), output(classifier))
    assert torch.equal(output(reloaded.base_model), output(model.base_model))


def test_second_generation_and_other_load_paths(tiny, tmp_path):
    model = pilon(tiny, "llama", tie_word_embeddings=False)
    first = save(tiny, model, tmp_path / "a")
    second = save(tiny, AutoModelForCausalLM.from_pretrained(first), tmp_path / "b")
    assert load_file(f"{first}/model.safetensors").keys() == load_file(f"{second}/model.safetensors").keys()
    for options in ({"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}):
        assert torch.equal(output(AutoModelForCausalLM.from_pretrained(second, **options)), output(model))
    half = AutoModelForCausalLM.from_pretrained(second, dtype=torch.bfloat16)
    layers = dict(projections(half))
    assert all(p.selected.dtype == torch.int64 and p.weight.dtype == torch.bfloat16 for p in layers.values())
    assert "config.json" in {p.name for p in (tmp_path / "b").iterdir()}
    assert AutoTokenizer.from_pretrained(second)("a b")["input_ids"]


def test_missing_pilon_tensor_is_refused(tiny, tmp_path):
    folder = save(tiny, pilon(tiny, "gpt2"), tmp_path / "m")
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    for lost in ("transformer.pilon_banks.band0.up.A", "transformer.h.1.mlp.c_fc.selected"):
        save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="lacks 1 PILON tensors"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_missing_kept_matrix_is_refused(tiny, tmp_path):
    path = f"{save(tiny, trimmed_pilon(tiny, 'llama'), tmp_path / 'm')}/model.safetensors"
    tensors = load_file(path)
    lost = "model.layers.2.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 PILON tensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_newer_format_is_refused(tiny, tmp_path):
    folder = save(tiny, pilon(tiny, "gpt2"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="upgrade pilon-compress"):
        AutoModelForCausalLM.from_pretrained(folder)


LOAD = """
import sys
{before}
from transformers import AutoModelForCausalLM
{after}
import torch
model = AutoModelForCausalLM.from_pretrained({folder!r}{flag})
out = model(input_ids=torch.arange(5, 25).reshape(2, 10)).logits.detach()
torch.save(out, {folder!r} + "/out.pt")
assert {absent} or "pilon_compress" not in sys.modules
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("order", ["before", "after"])
def test_import_registers_whichever_comes_first(bare, tiny, tmp_path, order):
    model = pilon(tiny, "gpt2")
    folder = save(tiny, model, tmp_path / "m")
    lines = {"before": "", "after": "", order: "import pilon_compress"}
    script = LOAD.format(folder=folder, flag="", absent=True, **lines)
    done = bare.python(script) if order == "after" else run(script)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(f"{folder}/out.pt", weights_only=True), output(model))


def test_without_the_package_loading_fails_loudly(bare, tiny, tmp_path):
    folder = save(tiny, pilon(tiny, "gpt2"), tmp_path / "m")
    done = bare.python(LOAD.format(folder=folder, flag="", absent=False, before="", after=""), code=None)
    assert done.returncode != 0 and "size mismatch" in done.stderr + done.stdout


def test_import_is_light():
    code = "import pilon_compress, sys; print([m for m in ('torch', 'transformers', 'sklearn') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("family", "make"),
    [("gpt2", pilon), ("llama", pilon), ("bert", pilon), ("gpt2", trimmed_pilon), ("llama", researched)],
)
def test_self_contained_folder_loads_without_the_package(bare, tiny, tmp_path, family, make):
    model = make(tiny, family)
    folder = save(tiny, model, tmp_path / "m")
    out = tmp_path / "own"
    export(folder, out, "self-contained")
    auto = "AutoModelForMaskedLM" if family in ENCODERS else "AutoModelForCausalLM"
    code = LOAD.replace("AutoModelForCausalLM", auto).format(
        folder=str(out), flag=", trust_remote_code=True", absent=False, before="", after=""
    )
    bare.python(code)
    assert torch.equal(torch.load(out / "out.pt", weights_only=True), output(model))
    here = AutoModel.from_pretrained(str(out))  # and as an ordinary PILON folder where the package is
    assert torch.equal(output(here), output(model.base_model))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_export_leaves_no_trace(tiny, family, tmp_path):
    model = pilon(tiny, family)
    before = output(model)
    plain = to_dense(model)
    folder = save(tiny, plain, tmp_path / "plain")
    text = (tmp_path / "plain" / "config.json").read_text()
    assert "pilon" not in text and not any("pilon" in key for key in load_file(f"{folder}/model.safetensors"))
    auto = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    torch.testing.assert_close(output(auto.from_pretrained(folder)), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_greedy_decoding_equals_full_forward(tiny, family):
    model = pilon(tiny, family)
    ids = IDS[:1]
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    full = ids
    with torch.no_grad():
        for _ in range(12):
            full = torch.cat([full, model(full).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, full)


def test_causal_and_batch_invariant(tiny):
    model = pilon(tiny, "llama")
    changed = IDS.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(output(model, changed)[:, :6], output(model)[:, :6], rtol=0, atol=1e-6)
    torch.testing.assert_close(output(model, IDS[:1]), output(model)[:1], rtol=1e-5, atol=1e-5)
