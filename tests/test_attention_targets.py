"""`--targets attention` and `all`: attention beside the feed-forward blocks, from plan to loaded model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from pilon_compress.config import conversion, training
from pilon_compress.convert.pipeline import convert, dry_run
from pilon_compress.convert.solve.sequential_targets import BlockPair
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.export.run import export
from pilon_compress.models.attention import attention_roles
from pilon_compress.models.families import find_sites
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.targets import target_of
from pilon_compress.train import preflight

TEXT = "\n\n".join(
    f"Paragraph {chr(97 + i % 26)}{i % 7} tells of {'many ' * (i % 5)}things by name." for i in range(200)
)
IDS = torch.tensor([[5 + (7 * row + place * place) % 90 for place in range(40)] for row in range(4)])
ROLES = {"llama": ["q", "k", "v", "o"], "gpt2": ["qkv", "o"], "bert": ["q", "k", "v", "o"]}
RATIO = 0.7


def asked(place, **sections):
    """The recipe that converts `place/dense`."""
    (place / "text.txt").write_text(TEXT)
    calibration = {"data": str(place / "text.txt"), "samples": 24, "sequence_length": 32, "batch_size": 8}
    data = {"model": str(place / "dense"), "calibration": calibration, "evaluation": {"data": "none"}}
    return conversion.build({**data, **sections})


def all_of(ratio=RATIO, targets=("all",), **more):
    return {"budget": {"ratio": ratio, **more}, "scope": {"targets": list(targets)}}


def output(folder, **options):
    model = (AutoModel if "bert" in str(folder) else AutoModelForCausalLM).from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(input_ids=IDS)[0]


@pytest.fixture(scope="module", params=list(ROLES))
def converted(request, tiny, tmp_path_factory):
    """(family, folder with dense and out, the report)."""
    place = tmp_path_factory.mktemp(request.param)
    tiny.save_tiny(request.param, place / "dense", heads="base" if request.param == "bert" else "lm")
    report = convert(asked(place, **all_of()), place / "out")
    return request.param, place, report.dump()


def test_one_budget_is_spent_over_both_and_reported_apart(converted):
    family, place, report = converted
    assert RATIO - 0.02 < report["replaced_size"]["stored_ratio"] <= RATIO
    for key in ("stored", "dense_stored", "bytes", "macs", "dense_macs"):
        assert report["ffn"][key] + report["attention"][key] == report["replaced_size"][key] > 0
    dense = AutoModel.from_pretrained(place / "dense")
    attention = sum(p.numel() for name, p in dense.named_parameters() if "att" in name and "orm" not in name)
    assert report["attention"]["dense_stored"] == attention
    roles = [part["role"] for part in report["plan"]["banks"] if target_of(part["names"][0]) == "attention"]
    assert sorted(set(roles)) == sorted(ROLES[family]) and len(roles) == 3 * len(ROLES[family])
    tensors = load_file(place / "out" / "model.safetensors")
    stored = sum(t.numel() for t in tensors.values())
    assert report["model"]["stored"] == stored or family == "gpt2", "the file is as small as said"


def test_every_label_says_what_it_is(converted, tmp_path):
    _, place, report = converted
    assert report["plan"]["ratio"] == RATIO and report["plan"]["ffn_ratio"] is None
    card, page = (place / "out" / "README.md").read_text(), (place / "out" / "report.html").read_text()
    assert "FFN and attention projections" in card and "Requested FFN and attention ratio: 0.7" in card
    assert "requested FFN and attention ratio" in page and "Whole FFN and attention" in page
    shown = anatomy(str(place / "out")).dump()
    for key in ("ffn", "attention", "replaced_size"):
        assert shown[key]["stored"] == report[key]["stored"]
    healed = preflight.plan(
        training.build(
            {"task": "heal", "start": str(place / "out"), "data": {"source": "stdlib", "sequence_length": 64}}
        )
    )
    assert healed.attention.stored == report["attention"]["stored"]


def test_it_loads_resumes_and_unfolds_to_the_same_function(converted, tmp_path):
    family, place, _ = converted
    ours, dense = output(place / "out"), output(place / "dense")
    assert 0 < (ours - dense).norm() < dense.norm()
    export(str(place / "out"), tmp_path / f"{family}-dense", "dense")
    assert torch.allclose(output(tmp_path / f"{family}-dense"), ours, atol=1e-4)


@pytest.mark.parametrize("family", ROLES)
def test_a_ratio_of_one_is_the_dense_model(tiny, tmp_path, family):
    place = tmp_path / family
    tiny.save_tiny(family, place / "dense", heads="base" if family == "bert" else "lm")
    report = convert(asked(place, **all_of(1)), place / "out")
    assert report.attention.stored_ratio == report.ffn.stored_ratio == 1
    assert torch.allclose(output(place / "out"), output(place / "dense"), atol=1e-4)


def test_attention_alone_leaves_the_feed_forward_weights_as_they_are(tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    report = convert(asked(tmp_path, **all_of(0.6, ["attention"])), tmp_path / "out")
    assert report.attention.stored_ratio <= 0.6 and (report.ffn.stored, report.ffn.stored_ratio) == (0, 1)
    assert "with the attention projections" in (tmp_path / "out" / "README.md").read_text()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    mlp = [name for name in before if "mlp" in name]
    assert mlp and all(torch.equal(before[name], after[name]) for name in mlp)


def test_numbers_go_where_the_model_feels_it_least(tiny, tmp_path):
    """Attention of rank 4 can be stored in a third of its numbers without loss; the feed-forward weights cannot."""
    model = tiny.save_tiny("llama", tmp_path / "dense")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "self_attn" in name:
                U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_((U[:, :4] * S[:4]) @ Vh[:4])
    model.save_pretrained(tmp_path / "dense")
    report = convert(asked(tmp_path, **all_of(0.8)), tmp_path / "out")
    assert report.attention.stored_ratio < 0.45 and report.ffn.stored_ratio > 0.9
    assert (output(tmp_path / "out") - output(tmp_path / "dense")).norm() < 0.05 * output(tmp_path / "dense").norm()


def test_integers_reach_attention_too(tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense", hidden_size=64, head_dim=16, intermediate_size=128)
    report = convert(asked(tmp_path, **all_of(1), form={"bank_dtype": "int4"}), tmp_path / "out")
    assert report.attention.bytes_ratio < 0.4 and report.ffn.bytes_ratio < 0.4
    layout = layout_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert layout.kinds == {"int4"} and len(layout.replaced) == 3 * 7


def test_shared_banks_leave_attention_to_its_layer(tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    report = convert(asked(tmp_path, **all_of(0.6, share="always")), tmp_path / "out")
    shared = {part["role"] for part in report.dump()["plan"]["banks"] if len(part["layers"]) > 1}
    assert shared and shared <= {"gate", "up"} and report.plan.bands == [[0, 1, 2]]
    assert output(tmp_path / "out").isfinite().all() and report.replaced_size.stored_ratio <= 0.6


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", "next"), ("bert", "next"), ("gpt_neox", "output"), ("gemma2", "next")]
)
def test_the_residual_sum_of_attention_is_measured(tiny, family, expected):
    source = Source(tiny.tiny_model(family))
    block = source.model.base_model.get_submodule(source.names[0])
    name = next(path for path, role in attention_roles(block).items() if role == "o")
    stream = Stream(source, [Batch(IDS, torch.ones_like(IDS))])
    assert BlockPair(block, block, stream, stream.fork()).sum_of(name) == expected


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"budget": {"ffn_ratio": 0.5}, "scope": {"targets": ["all"]}}, "--ratio"),
        ({"budget": {"ffn_ratio": 0.5}, "scope": {"targets": ["re:.*q_proj"]}}, "attention are to be replaced"),
        ({**all_of(1), "form": {"elastic": True}}, "elastic"),
        (all_of(0.5, ["attention"], share="auto"), "whole"),
    ],
)
def test_what_is_of_feed_forward_blocks_alone_is_refused(tiny, tmp_path, sections, message):
    tiny.save_tiny("llama", tmp_path / "dense")
    with pytest.raises(BadInput, match=message):
        dry_run(asked(tmp_path, **sections))


def test_two_ratios_are_refused_and_other_targets_have_a_default(tmp_path):
    with pytest.raises(BadInput, match=r"budget\.ratio"):
        asked(tmp_path, budget={"ratio": 0.5, "ffn_ratio": 0.5})
    budget = asked(tmp_path, scope={"targets": ["attention"]}).budget
    assert (budget.ratio, budget.ffn_ratio) == (0.5, None)


def test_targets_are_words_that_ignore_knows_too(tiny):
    model = tiny.tiny_model("llama")
    assert len(find_sites(model, ["all"])) == 3 * 7 and find_sites(model, ["ffn"]) == find_sites(model)
    assert find_sites(model, ["all"], ["attention"]) == find_sites(model)
    more = find_sites(model, ["ffn", "re:.*q_proj"])
    assert {site.role for site in more} == {"q", "gate", "up", "down"}
    first = {site.input for site in find_sites(model, ["attention"]) if site.role != "o"}
    assert first == {f"layers.{layer}.self_attn.q_proj" for layer in range(3)}, "q, k and v read the same"
    for layer in model.model.layers:
        layer.self_attn.q_a_proj = layer.self_attn.q_proj  # latent attention has other projections than these
        del layer.self_attn.q_proj
    with pytest.raises(BadInput, match="no attention projections"):
        find_sites(model, ["attention"])


def test_the_command_line_says_both(cli, tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ("convert", "dense", "--targets", "all", "--ratio", "0.7", "--calibration", "text.txt", "--samples", "24")
    shown = cli(*words, "--sequence-length", "32", "--dry-run", cwd=tmp_path)
    assert "FFN 0." in shown.stdout + shown.stderr and "attention 0." in shown.stdout + shown.stderr
    told = json.loads(cli(*words, "--sequence-length", "32", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert {"ffn", "attention", "replaced_size", "model"} <= told.keys() and told["attention"]["stored_ratio"] <= 1
