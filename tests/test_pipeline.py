"""Conversion of every family: exact where the plan has full rank, and confined to what was asked for."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from pilon_compress.config.conversion import build
from pilon_compress.convert.pipeline import convert
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.models.families import FAMILIES
from pilon_compress.nn.installed import dense_matrices, projections

IDS = torch.arange(5, 45).reshape(2, 20)
PROSE = "\n\n".join(
    f"Paragraph {chr(97 + i % 26)}{chr(97 + i // 26)} tells of {'many ' * (i % 5)}things and of nothing else "
    "but the very things it names."
    for i in range(60)
)


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return path


def run(dense, prose, out, **options):
    calibration = {"data": str(prose), "samples": 32, "sequence_length": 64}
    return convert(
        build({"model": str(dense), "calibration": calibration, "evaluation": {"data": "none"}, **options}), out
    ).dump()


def logits(auto, folder):
    with torch.no_grad():
        return auto.from_pretrained(folder)(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_rank_plan_reproduces_every_family(tiny, tmp_path, prose, family):
    tiny.save_tiny(family, tmp_path / "dense")
    run(tmp_path / "dense", prose, tmp_path / "full", budget={"ffn_ratio": 2.0, "allow_larger": True})
    auto = AutoModelForMaskedLM if family in tiny.ENCODERS else AutoModelForCausalLM
    expected = logits(auto, tmp_path / "dense")
    torch.testing.assert_close(logits(auto, tmp_path / "full"), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1, "logits that say something"


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "bert"])
def test_an_allocation_at_full_size_reproduces_the_logits(tiny, tmp_path, prose, family):
    tiny.save_tiny(family, tmp_path / "dense")
    report = run(tmp_path / "dense", prose, tmp_path / "full", budget={"ffn_ratio": 1.0})
    assert report["ffn"]["stored_ratio"] <= 1 and report["ffn"]["mac_ratio"] <= 1
    auto = AutoModelForMaskedLM if family in tiny.ENCODERS else AutoModelForCausalLM
    dense, full = (logits(auto, tmp_path / name) for name in ("dense", "full"))
    torch.testing.assert_close(full, dense, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_half_the_numbers_and_half_the_arithmetic(tiny, tmp_path, prose, family):
    dense = tiny.save_tiny(family, tmp_path / "dense")
    report = run(tmp_path / "dense", prose, tmp_path / "half", budget={"ffn_ratio": 0.5, "optimize": "compute"})
    assert 0.4 < report["ffn"]["stored_ratio"] <= 0.5 and report["ffn"]["mac_ratio"] <= 0.5
    auto = AutoModelForMaskedLM if family in tiny.ENCODERS else AutoModelForCausalLM
    half = auto.from_pretrained(tmp_path / "half")
    missing = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in half.parameters())
    indices = sum(layer.top_k for _, layer in projections(half))
    assert report["ffn"]["dense_stored"] - report["ffn"]["stored"] == missing - indices, "the model is as small as said"
    assert all(0 <= loss < 1 for loss in report["whitened_loss"].values())


def test_targets_and_ignore_decide_what_is_replaced_and_nothing_else_changes(tiny, tmp_path, prose):
    tiny.save_tiny("llama", tmp_path / "dense")
    scope = {"targets": [r"re:.*mlp\.(up|down)_proj"], "ignore": [r"re:layers\.1\."]}
    run(tmp_path / "dense", prose, tmp_path / "some", scope=scope)
    dense, some = (AutoModel.from_pretrained(tmp_path / name) for name in ("dense", "some"))
    replaced = {name for name, _ in (*projections(some), *dense_matrices(some))}
    assert replaced == {f"layers.{layer}.mlp.{role}_proj" for layer in (0, 2) for role in ("up", "down")}
    kept = {k: v for k, v in dense.state_dict().items() if k.rpartition(".")[0] not in replaced}
    assert len(kept) > 20 and all(torch.equal(v, some.state_dict()[k]) for k, v in kept.items())
    shown = {entry["name"] for entry in anatomy(str(tmp_path / "some")).dump()["projections"] if entry["bank"]}
    assert shown == replaced, "inspect shows what was replaced"


def test_inspect_shows_replaced_projections_outside_the_feed_forward_block(tiny, tmp_path, prose):
    tiny.save_tiny("bert", tmp_path / "dense")
    run(tmp_path / "dense", prose, tmp_path / "queries", scope={"targets": ["re:.*attention.*query"]})
    shown = anatomy(str(tmp_path / "queries")).dump()["projections"]
    assert len(shown) == 3 and all("query" in entry["name"] and entry["bank"] for entry in shown)
