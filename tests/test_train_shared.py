"""Layers that share primitives from scratch: ratios met or refused, even selections, runs that end and load."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pilon_compress.config import training
from pilon_compress.config.model import FfnConfig, HostConfig
from pilon_compress.errors import BadInput
from pilon_compress.models import base_architectures, checkpoint, layouts
from pilon_compress.models.families import find_sites
from pilon_compress.nn.installed import neuron_banks, neuron_blocks, projections
from pilon_compress.nn.size import ffn_size
from pilon_compress.nn.sizing import MET
from pilon_compress.nn.usage import shared_primitives
from pilon_compress.optimize.optimizers import group_parameters

SMALL = HostConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256, vocab_size=64)


def config(family="arcee"):
    return base_architectures.config_for(SMALL.model_copy(update={"family": family}), 64, 0)


def layout(ffn, family="arcee"):
    return layouts.layout_for(find_sites(checkpoint.empty_model(config(family))), ffn)


def built(ffn, family="arcee", seed=0):
    return base_architectures.build_with(config(family), layout(ffn, family), seed)


def always(primitive, stored, macs, **more):
    return FfnConfig(primitive=primitive, share="always", ffn_ratio=stored, mac_ratio=macs, **more)


@settings(max_examples=60, deadline=None)
@given(
    primitive=st.sampled_from(["factors", "neurons"]),
    stored=st.floats(0.15, 0.6),
    more=st.floats(1.05, 4),
    scales=st.booleans(),
    family=st.sampled_from(["arcee", "llama"]),
)
def test_both_ratios_are_met_or_refused(primitive, stored, more, scales, family):
    macs = min(1.0, stored * more)
    ffn = always(primitive, stored, macs, scales=scales or primitive == "factors")
    try:
        found = ffn_size(layout(ffn, family)).over_dense()
    except BadInput as refusal:
        assert "ratio" in str(refusal) and "\n" not in str(refusal)
        return
    assert abs(found.stored_ratio - stored) <= MET + 1e-9 and abs(found.mac_ratio - macs) <= MET + 1e-9


@pytest.mark.parametrize("primitive", ["factors", "neurons"])
def test_macs_beyond_what_can_be_spent_are_refused_with_what_can(primitive):
    with pytest.raises(BadInput, match=r"mac_ratio 0\.9 cannot be spent .* lower it to 0\.\d+ at most") as refusal:
        layout(always(primitive, 0.1, 0.9))
    most = float(re.search(r"lower it to (0\.\d+)", str(refusal.value))[1])
    assert 0.45 < most < 0.6
    found = ffn_size(layout(always(primitive, 0.1, most))).over_dense()
    assert abs(found.stored_ratio - 0.1) <= MET and abs(found.mac_ratio - most) <= MET
    with pytest.raises(BadInput, match="in bands of 2 layers"):
        layout(always(primitive, 0.25, 0.75, bands=3))


@pytest.mark.parametrize("primitive", ["factors", "neurons"])
@pytest.mark.parametrize(("stored", "macs"), [(0.25, 1.0), (0.25, 0.4), (0.1, 0.9)])
def test_auto_spends_what_can_be_spent_and_never_more(primitive, stored, macs):
    found = ffn_size(layout(FfnConfig(primitive=primitive, ffn_ratio=stored, mac_ratio=macs))).over_dense()
    assert stored - 2 * MET <= found.stored_ratio <= stored
    assert min(macs, 0.5) - 2 * MET <= found.mac_ratio <= macs


@pytest.mark.parametrize("primitive", ["factors", "neurons"])
def test_without_sharing_every_layer_has_its_own(primitive):
    ffn = FfnConfig(primitive=primitive, share="none", ffn_ratio=0.25, mac_ratio=0.75)
    found, size = layout(ffn), ffn_size(layout(ffn)).over_dense()
    assert all(len(found.users(bank)) == 1 for bank in found.banks) and not found.neuron_banks
    assert size.stored_ratio <= 0.25 and size.mac_ratio == pytest.approx(0.25, abs=0.02)
    capped = ffn_size(layout(FfnConfig(primitive=primitive, share="none", mac_ratio=0.2))).over_dense()
    assert capped.mac_ratio <= 0.2, "the ratio of MACs is a limit"


def test_neurons_are_used_by_equally_many_layers_that_overlap():
    model = built(always("neurons", 0.25, 0.6, bands=1))
    (_, bank), used = next(neuron_banks(model)), []
    for block in neuron_blocks(model):
        assert block["up"].owns and block["down"].selection is block["up"].selection
        used.append(torch.zeros(bank.neurons).index_fill(0, block["up"].selection.selected, 1.0))
        assert used[-1].sum() == block["up"].top_k
    counts = torch.stack(used).sum(0)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    assert len({tuple(mask.tolist()) for mask in used}) == 6, "no two layers select the same"
    again = built(always("neurons", 0.25, 0.6, bands=1))
    ours, theirs = (next(neuron_blocks(one))["up"].selection.selected for one in (model, again))
    assert torch.equal(ours, theirs)


def test_primitives_of_shared_banks_serve_several_layers():
    model = built(always("factors", 0.25, 0.75))
    users: dict[int, torch.Tensor] = {}
    for _, layer in projections(model):
        users[id(layer.bank)] = users.get(id(layer.bank), 0) + layer.used().int()
    assert all(counts.min() >= 2 for counts in users.values())
    assert shared_primitives(model) == sum(len(counts) for counts in users.values())
    neurons = built(always("neurons", 0.25, 0.6, bands=1))
    (_, bank), counts = next(neuron_banks(neurons)), torch.zeros(1)
    for block in neuron_blocks(neurons):
        counts = counts + torch.zeros(bank.neurons).index_fill(0, block["up"].selection.selected, 1.0)
    assert shared_primitives(neurons) == int((counts > 1).sum()) > 0
    assert shared_primitives(built(FfnConfig(kind="lowrank"))) == 0


@pytest.mark.parametrize("family", ["arcee", "llama"])
def test_a_new_block_of_shared_neurons_varies_as_a_plain_narrow_one(family):
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    shared, plain = built(always("neurons", 0.25, 0.5), family), built(FfnConfig(primitive="neurons"), family)
    stds = [float(model.model.layers[1].mlp(x).detach().std()) for model in (shared, plain)]
    assert stds[0] == pytest.approx(stds[1], rel=0.3)


def test_neurons_learn_as_matrices_and_their_scales_as_compositions():
    groups = group_parameters(built(always("neurons", 0.25, 0.5)))
    assert sum("pilon_banks" in name for name in groups["matrices"]) == 6, "three bands of up and down"
    assert len(groups["compositions"]) == 12 and not groups["banks"]
    assert all(name.endswith("mlp.up_proj.bias") for name in groups["vectors"] if "mlp" in name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ffn.share=always", "ffn.dense_until=0.5"], "set it to 0"),
        (["ffn.share=always", "ffn.mac_ratio=0.5"], "ffn.mac_ratio must be above ffn.ffn_ratio"),
        (["ffn.matrices=true"], "moved to ffn.primitive"),
        (["ffn.share=always", "ffn.top_k=3"], "follows from the ratios"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(BadInput) as refusal:
        training.load("smoke", words)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ffn.primitive=neurons", "ffn.rank=8"], "ffn.rank: has no effect with ffn.primitive neurons"),
        (["ffn.primitive=neurons", "ffn.dense_until=0.5"], "ffn.dense_until: has no effect with ffn.primitive neurons"),
        (["ffn.share=none", "ffn.bands=2"], "ffn.bands: has no effect with ffn.share none"),
        (["ffn.scales=false"], "ffn.scales: has no effect with ffn.primitive factors"),
        (["ffn.kind=dense", "ffn.share=always", "ffn.mac_ratio=1"], "ffn.mac_ratio, ffn.share: has no effect"),
    ],
)
def test_fields_without_effect_are_told(words, told):
    assert any(told in sentence for sentence in training.idle(training.load("smoke", words)))


RUN = ("--set", "schedule.tokens=12288", "--set", "device=cpu", "--json")


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("scales", [True, False])
def test_the_command_trains_neurons_that_layers_share(cli, tmp_path, ternary, scales):
    words = ["--primitive", "neurons", "--share", "always", "--ffn-ratio", "0.25", "--mac-ratio", "0.5"]
    words += ["--set", f"ffn.scales={scales}".lower(), *(["--ternary"] if ternary else [])]
    done = cli("train", "--recipe", "smoke", "-o", "out", *words, *RUN, cwd=tmp_path)
    result = json.loads(done.stdout)
    assert abs(result["ffn"]["stored_ratio"] - 0.25) <= MET and abs(result["ffn"]["mac_ratio"] - 0.5) <= MET
    assert result["val_perplexity"] < 400 < 512
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    if ternary:
        cli("export", "out", "--to", "packed", "-o", "packed", cwd=tmp_path)
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
        assert torch.equal(packed(input_ids=ids).logits, before)
    else:
        cli("export", "out", "--to", "dense", "-o", "dense", cwd=tmp_path)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
        torch.testing.assert_close(dense(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
        inner = dense.config.intermediate_size
        assert inner == model.model.layers[0].mlp.up_proj.out_features < 256, "narrower, as stored"


def test_the_command_refuses_macs_that_cannot_be_spent(cli, tmp_path):
    words = ["--share", "always", "--ffn-ratio", "0.1", "--mac-ratio", "0.9"]
    done = cli("train", "--recipe", "smoke", "-o", "out", *words, *RUN, cwd=tmp_path, code=2)
    assert (
        "mac-ratio 0.9 cannot be spent" in done.stderr
        and "lower it to 0.39" in done.stderr
        and not (tmp_path / "out").exists()
    )
