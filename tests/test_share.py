"""Shared banks: in one plan with neurons and ranks, both budgets kept, accepted where the model's own loss falls."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pilon_compress.config.conversion import build
from pilon_compress.convert.allocate.budget import allocate, size_layers
from pilon_compress.convert.calibrate.second_moments import gather
from pilon_compress.convert.pipeline import convert
from pilon_compress.convert.sharing.options import Sharing
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models.families import find_sites
from pilon_compress.models.source import Source
from pilon_compress.nn.size import ffn_size

TEXT = "Some words about nothing, again and again. Others, now and then, about {}. "


def alike(tiny, much=0.02, family="llama"):
    """A model whose layers' feed-forward blocks are nearly the same: sharing must pay."""
    model = tiny.tiny_model(family)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for mine, first in zip(layer.mlp.parameters(), model.model.layers[0].mlp.parameters(), strict=True):
                mine.copy_(first + much * mine)
    return model


@pytest.fixture(scope="module")
def sized(tiny):
    """The dense model of layers that are alike, and their sizings at 0.4 if all neurons stay."""
    model = alike(tiny)
    source, sites = Source(model), find_sites(model)
    ids = torch.randint(5, 250, (8, 32), generator=torch.Generator().manual_seed(0))
    dense = Dense(source, sites, gather(source, [Batch(ids, torch.ones_like(ids))], sites, causal=True))
    return dense, size_layers(dense, 0.4, neurons=False)


def test_layers_that_are_alike_share_within_what_they_would_store_alone(sized):
    dense, sizings = sized
    menus = Sharing(dense, 0.4, 30).menus(sizings, [[0, 1, 2]])
    alone, together = allocate(sizings, 0.4), allocate(sizings, 0.4, None, menus)
    assert together.plan.bands == [[0, 1, 2]], "one plan takes the band, because it loses less"
    assert sum(together.losses.values()) < 0.7 * sum(alone.losses.values())
    size = ffn_size(together.plan.layout())
    assert size.stored <= 0.4 * size.dense_stored and size.macs <= size.dense_macs
    assert not Sharing(dense, 0.4, 30).menus(sizings, [[0], [1], [2]]), "one layer shares nothing"


@pytest.mark.parametrize("macs", [0.5, 0.7, 0.9])
def test_both_budgets_of_a_plan_that_shares_are_spent(sized, macs):
    dense, sizings = sized
    menus = Sharing(dense, 0.4, 4).menus(sizings, [[0, 1, 2]], down=True)
    size = ffn_size(allocate(sizings, 0.4, macs, menus, always=True).plan.layout())
    with pytest.raises(BadInput, match=r"ratio 0.4 cannot be spent with MACs of 0.25, a band"):
        allocate(sizings, 0.4, 0.25, menus, always=True)
    assert size.stored / size.dense_stored == pytest.approx(0.4, abs=0.01)
    assert size.macs / size.dense_macs == pytest.approx(macs, abs=0.01)


@pytest.fixture(scope="module")
def dense_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alike")
    for much in (0.02, 1.0):
        alike(tiny, much).save_pretrained(folder / f"{much}")
        tiny.tiny_tokenizer().save_pretrained(folder / f"{much}")
    (folder / "text.txt").write_text("".join(TEXT.format(n) for n in range(600)))
    return folder


def asked(folder, much, **budget):
    text = str(folder / "text.txt")
    return {
        "model": str(folder / f"{much}"),
        "budget": {"ffn_ratio": 0.4, **budget},
        "calibration": {"data": text, "samples": 16, "sequence_length": 32, "batch_size": 8},
        "evaluation": {"data": text, "window": 32, "samples": 8},
    }


def test_auto_shares_where_the_model_gains_and_its_banks_are_saved_once(dense_folder, tmp_path):
    report = convert(build(asked(dense_folder, 0.02, share="auto", neurons=False)), tmp_path / "out").dump()
    tensors = load_file(tmp_path / "out/model.safetensors")
    shared = {f"model.pilon_banks.band0.{role}.A" for role in ("gate", "up")}
    assert shared <= {name for name in tensors if name.endswith(("gate.A", "up.A"))} == shared, "one bank of each role"
    assert report["plan"]["bands"] == [[0, 1, 2]] and report["ffn"]["shared_primitives"] > 0
    assert report["ffn"]["stored_ratio"] <= 0.4 and report["evaluation"]["perplexity_ratio"] < 1.5
    sharing = report["sharing"]
    assert sharing["loss"] <= sharing["alone"], "in the measure that it is chosen by"
    assert sharing["bands"][0]["accepted"] and sharing["bands"][0]["shared"] < sharing["bands"][0]["private"]
    layout = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["layout"]
    assert any(spec["bank"].startswith("band0.") for spec in layout["projections"].values())


def test_auto_is_what_no_sharing_makes_where_that_is_better(dense_folder, tmp_path):
    """Layers that have nothing in common: the same file, bit for bit, unless the measured loss is lower."""
    auto = convert(build(asked(dense_folder, 1.0, share="auto")), tmp_path / "auto").dump()
    convert(build(asked(dense_folder, 1.0)), tmp_path / "none")
    if auto["ffn"]["shared_primitives"]:
        assert auto["sharing"]["loss"] <= auto["sharing"]["alone"]
    else:
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("auto", "none"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_contract_of_the_command_line(cli, dense_folder, tmp_path):
    words = [str(dense_folder / "1.0"), "--calibration", str(dense_folder / "text.txt"), "--samples", "16"]
    words += [
        "--sequence-length",
        "32",
        "--batch-size",
        "8",
        "--eval-data",
        "none",
        "--ffn-ratio",
        "0.4",
        "--effort",
        "fast",
        "--json",
    ]
    always = ("--share", "always", "--mac-ratio", "0.6")
    told = json.loads(cli("convert", *words, *always, "-o", str(tmp_path / "always")).stdout)
    assert told["ffn"]["stored_ratio"] == pytest.approx(0.4, abs=0.01)
    assert told["ffn"]["mac_ratio"] == pytest.approx(0.6, abs=0.01) and told["ffn"]["shared_primitives"] > 0
    auto = cli("convert", *words[:-1], "--share", "auto", "-o", str(tmp_path / "auto"))
    assert "no band shares: by the metric's loss none would gain" in auto.stdout + auto.stderr
    alike = (str(dense_folder / "0.02"), *words[1:-1], "--set", "budget.neurons=false", "--share", "auto")
    tried = cli("convert", *alike, "-o", str(tmp_path / "alike"))
    assert "Trials of shared banks: the model's loss on held-out text" in tried.stdout + tried.stderr
    none = json.loads(cli("convert", *words, "--share", "none", "-o", str(tmp_path / "none")).stdout)
    assert none["ffn"]["shared_primitives"] == 0
    short = ("--share", "always", "--mac-ratio", "0.95", "--bands", "[[0, 1], [2]]", "-o", str(tmp_path / "x"))
    told = cli("convert", *words, *short, code=2).stderr
    assert "cannot be spent at ratio 0.4: shared banks take up to" in told and not (tmp_path / "x").exists()
