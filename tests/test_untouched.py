"""Experts and routers that stay as they are: named, counted, and shown by `inspect`."""

import pytest

from pilon_compress.evaluate.untouched import notes, untouched
from pilon_compress.models.families import find_sites


def test_experts_and_routers_are_counted(tiny):
    model = tiny.other_model("qwen2_moe")
    left = untouched(model, find_sites(model))
    block = model.model.layers[0].mlp
    expected = {
        "layers.*.mlp.experts": sum(p.numel() for p in block.experts.parameters()),
        "layers.*.mlp.gate": block.gate.weight.numel(),
        "layers.*.mlp.shared_expert_gate": block.shared_expert_gate.weight.numel(),
    }
    total = sum(p.numel() for p in model.parameters())
    assert {entry.name: entry.parameters for entry in left} == {k: 3 * v for k, v in expected.items()}
    assert all(entry.share == pytest.approx(entry.parameters / total) for entry in left)
    assert [entry.parameters for entry in left] == sorted((e.parameters for e in left), reverse=True)


def test_shared_experts_that_are_not_chosen_are_untouched_as_well(tiny):
    model = tiny.other_model("qwen2_moe")
    some = find_sites(model, ignore=[r"re:layers\.[12]\."])
    names = {entry.name: entry.parameters for entry in untouched(model, some)}
    assert names["layers.*.mlp.shared_expert"] == 2 * 3 * 32 * 48


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_dense_models_have_none(tiny, family):
    model = tiny.tiny_model(family)
    assert untouched(model, find_sites(model)) == [] and notes(model, find_sites(model)) == []


def test_inspect_says_it(cli, tiny, tmp_path):
    model = tiny.other_model("qwen2_moe", num_experts=64)
    model.save_pretrained(tmp_path / "moe")
    shown = cli("inspect", "moe", cwd=tmp_path)
    assert shown.returncode == 0
    said = shown.stdout + shown.stderr
    assert "mixture of experts: " in said and "% of the parameters are not touched (layers.*.mlp.experts" in said
    few = find_sites(model, targets=["layers.0.mlp.shared_expert.up_proj"])
    assert any(note.startswith("only ") and "would be replaced" in note for note in notes(model, few))
