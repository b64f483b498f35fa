"""The table against real architectures, and detection against the table."""

import pytest
import torch
from torch import nn

from pilon_compress.errors import BadInput
from pilon_compress.models.families import FAMILIES, detect, find_sites
from pilon_compress.nn.size import linear_macs

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_row_names_real_projections(tiny, family):
    model = tiny.tiny_model(family)
    sites = find_sites(model)
    roles = {"gate", "up", "down"} if family in GATED else {"gate_up", "down"} if family == "phi3" else {"up", "down"}
    assert {site.role for site in sites} == roles and len(sites) == 3 * len(roles)
    for site in sites:
        wide = 128 if site.role == "gate_up" else 64
        assert (site.d_in, site.d_out) == ((64, 32) if site.role == "down" else (32, wide))
        module = model.base_model.get_submodule(site.name)
        assert (module.bias is not None) == site.bias
    assert len({site.input for site in sites}) == 6, "gate and up of a layer read the same input"


@pytest.mark.parametrize("family", FAMILIES)
def test_detection_by_shape_finds_what_the_table_says(tiny, family):
    assert detect(tiny.tiny_model(family)) == FAMILIES[family]


def test_unknown_architecture_is_detected(tiny):
    model = tiny.tiny_model("llama")
    model.config.model_type = "brand_new"
    assert [s.role for s in find_sites(model)] == ["gate", "up", "down"] * 3


def test_targets_and_ignore(tiny):
    model = tiny.tiny_model("llama")
    assert {s.layer for s in find_sites(model, ignore=[r"re:layers\.[02]\."])} == {1}
    assert {s.role for s in find_sites(model, targets=[r"re:.*mlp\.up_proj$"])} == {"up"}
    assert [s.name for s in find_sites(model, targets=["layers.1.mlp.down_proj"])] == ["layers.1.mlp.down_proj"]
    everything = find_sites(model, targets=["Linear"], ignore=["re:.*mlp"])
    assert {s.role for s in everything} == set("qkvo")
    for bad in (["re:nothing"], ["nothing"]):
        with pytest.raises(BadInput, match="no projection matches"):
            find_sites(model, targets=bad)
    with pytest.raises(BadInput, match="regular expression"):
        find_sites(model, targets=["re:("])


def test_models_without_feed_forward_are_refused(tiny):
    model = tiny.tiny_model("bert")
    model.config.model_type = "brand_new"
    for layer in model.base_model.encoder.layer:
        layer.intermediate.dense = nn.Identity()
        layer.output.dense = nn.Identity()
    with pytest.raises(BadInput, match="no feed-forward projections"):
        find_sites(model)


def test_macs_count_every_linear_and_the_head(tiny):
    model = tiny.tiny_model("gpt2")
    by_hand = 3 * (32 * 96 + 32 * 32 + 2 * 32 * 64) + 32 * model.config.vocab_size
    assert linear_macs(model) == by_hand
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["mamba", "mixtral"])
def test_state_space_mixers_and_experts_are_not_feed_forward(tiny, name):
    with pytest.raises(BadInput, match="no feed-forward projections"):
        find_sites(tiny.other_model(name))


def test_of_a_hybrid_only_the_feed_forward_block_is_found(tiny):
    """Jamba's blocks alternate: a state-space mixer or attention, a feed-forward block or experts."""
    sites = find_sites(tiny.other_model("jamba"))
    assert {site.role for site in sites} == {"gate", "up", "down"}
    assert all(".feed_forward." in site.name for site in sites) and {site.layer for site in sites} == {0, 2}


def test_attention_is_told_by_structure(tiny):
    """Check that attention under another name is not taken for a feed-forward part in a block without one."""
    model = tiny.tiny_model("qwen3", head_dim=16)
    model.config.model_type = "brand_new"
    for layer in model.model.layers:
        layer.mixer, layer.mlp = layer.self_attn, nn.Identity()
        del layer.self_attn
        layer.mixer.__class__ = type("Mixer", (type(layer.mixer),), {})
    with pytest.raises(BadInput, match="no feed-forward projections"):
        find_sites(model)
    assert {site.role for site in find_sites(model, targets=["re:.*mixer.q_proj"])} == {"q"}
