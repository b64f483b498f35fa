"""Additions of research to banks and projections: saved and loaded by name, counted, folded, exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pilon_compress.config.budget import Budget
from pilon_compress.convert.allocate.uniform import make_plan
from pilon_compress.errors import BadInput
from pilon_compress.export.dense import to_dense
from pilon_compress.export.run import export
from pilon_compress.export.save import save_model
from pilon_compress.models import checkpoint
from pilon_compress.models.families import find_sites
from pilon_compress.nn.fold import fold
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import layout_of, projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import model_size
from pilon_compress.optimize.optimizers import group_parameters

IDS = torch.arange(5, 25).reshape(2, 10)


def researched(tiny, norms=True, family="llama"):
    """A random PILON model whose banks have latent options, and whose down projections a norm."""
    model = tiny.tiny_model(family)
    layout = make_plan(find_sites(model), Budget(ffn_ratio=0.6), "pilon", "component").layout()
    for kind in ("latent_scale", "latent_bias"):
        layout = layout.with_addition("original", kind, layout.banks)
    if norms:
        down = [site.name for site in find_sites(model) if site.role == "down"]
        layout = layout.with_addition("bitnet", "sub_norm", down)
    generator = torch.Generator().manual_seed(0)
    initialise(install(model, layout), 0.1, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "latent" in name or "mlp" in name and "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(tiny, model, folder):
    folder.mkdir(exist_ok=True)
    save_model(model, tiny.tiny_tokenizer(), folder, torch.float32)
    return folder


@torch.no_grad()
def output(model):
    return model(input_ids=IDS).logits


def test_a_saved_model_names_its_research_and_computes_the_same(tiny, tmp_path):
    model = researched(tiny)
    layout = layout_of(model)
    folder = save(tiny, model, tmp_path / "m")
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]["layout"]
    assert set(stored["research"]["original"]) == {"latent_scale", "latent_bias"}
    assert all("down" in name for name in stored["research"]["bitnet"]["sub_norm"])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert layout_of(loaded) == layout == Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert torch.equal(output(loaded), output(model))
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert model_size(layout, tiny.tiny_model("llama")).stored == numbers, "what is counted is what the file holds"


def test_additions_change_what_is_computed_and_learn(tiny):
    model = researched(tiny)
    before, added = (
        output(model),
        [p for n, p in model.named_parameters() if "latent" in n or "mlp" in n and "norm" in n],
    )
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert added and all(parameter.grad.abs().max() > 0 for parameter in added)
    groups = group_parameters(model)
    assert any("latent_scale" in name for name in groups["compositions"])
    with torch.no_grad():
        for parameter in added:
            parameter.add_(0.5)
    assert not torch.allclose(output(model), before, atol=1e-2)


@pytest.mark.parametrize("norms", [False, True])
def test_folded_models_compute_the_same(tiny, norms):
    model = researched(tiny, norms)
    before = output(model)
    fold(model)
    assert not list(projections(model))
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-5)


def test_latent_options_multiply_out_and_norms_have_no_place_in_a_dense_model(tiny, tmp_path):
    model = researched(tiny, norms=False)
    before = output(model)
    torch.testing.assert_close(output(to_dense(model)), before, rtol=0, atol=1e-5)
    folder = save(tiny, researched(tiny), tmp_path / "m")
    with pytest.raises(BadInput, match="normalises the inputs"):
        export(str(folder), tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()


def unknown_module(layout):
    layout["research"]["elsewhere"] = layout["research"].pop("original")
    return "of research.elsewhere, which is not known"


def unknown_kind(layout):
    layout["research"]["bitnet"]["super_norm"] = layout["research"]["bitnet"].pop("sub_norm")
    return "super_norm of research.bitnet"


def unknown_place(layout):
    layout["research"]["bitnet"]["sub_norm"].append("layers.9.mlp.down_proj")
    return "research.bitnet names 'layers.9.mlp.down_proj'"


def no_table(layout):
    layout["research"]["bitnet"] = ["sub_norm"]
    return "research is no table"


def earlier(layout):
    next(iter(layout["banks"].values()))["latent_scale"] = True
    return "has latent_scale, of an earlier version: make the model again"


@pytest.mark.parametrize("damage", [unknown_module, unknown_kind, unknown_place, no_table, earlier])
def test_a_layout_that_names_what_is_not_here_is_refused_in_one_line(tiny, tmp_path, damage):
    folder = save(tiny, researched(tiny), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    part = damage(config["quantization_config"]["layout"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput) as caught:
        checkpoint.load_model(str(folder), dtype=torch.float32)
    assert part in str(caught.value) and "\n" not in str(caught.value)
