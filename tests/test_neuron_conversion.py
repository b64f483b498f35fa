"""Conversion into banks of whole neurons: exact where layers are alike, budgets kept, neurons matched, resumed."""

import copy

import pytest
import torch

from pilon_compress.config.conversion import build
from pilon_compress.convert import pipeline
from pilon_compress.convert.neurons import bank_fit, matching
from pilon_compress.convert.pipeline import convert, convert_in_memory
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.export.dense import to_dense
from pilon_compress.models import checkpoint
from pilon_compress.nn.installed import layout_of, neuron_banks
from pilon_compress.nn.size import ffn_size
from pilon_compress.train.bank_diagnostics import BankDiagnostics

TEXT = "Some words about nothing, again and again. Others, now and then, about {}. "


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    made = tmp_path_factory.mktemp("neurons")
    (made / "text.txt").write_text("".join(TEXT.format(n) for n in range(600)))
    return made


def asked(folder, model, **budget):
    text = str(folder / "text.txt")
    return {
        "model": str(folder / model),
        "budget": {"share": "always", "primitive": "neurons", **budget},
        "calibration": {"data": text, "samples": 16, "sequence_length": 32, "batch_size": 8},
        "evaluation": {"data": "none"},
    }


def twins(tiny, folder, name, noise=0.0):
    """Save a model of two layers; the second one's neurons are the first one's, permuted and scaled, and some noise."""
    model = tiny.tiny_model("llama", num_hidden_layers=2)
    first, second = (layer.mlp for layer in model.model.layers)
    order, scale = torch.randperm(64), 0.5 + torch.rand(64)
    with torch.no_grad():
        second.gate_proj.weight.copy_((first.gate_proj.weight * scale[:, None])[order])
        second.up_proj.weight.copy_((-first.up_proj.weight * scale[:, None])[order])
        second.down_proj.weight.copy_((first.down_proj.weight / scale)[:, order])
        for matrix in second.parameters():
            matrix.add_(noise * matrix.std() * torch.randn_like(matrix))
    model.save_pretrained(folder / name)
    tiny.tiny_tokenizer().save_pretrained(folder / name)
    return model


def outputs(model):
    ids = torch.randint(5, 250, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids)[0]


def difference(a, b):
    a, b = outputs(a), outputs(b)
    return float((a - b).norm() / a.norm())


def test_layers_of_the_same_neurons_share_them_without_loss(tiny, folder):
    dense = twins(tiny, folder, "same")
    converted = convert_in_memory(build(asked(folder, "same", ffn_ratio=0.55, mac_ratio=1.0)))
    assert difference(dense, converted.model) < 1e-3
    assert converted.report.ffn.shared_primitives == 63
    ((_, bank),) = neuron_banks(converted.model)
    assert bank.neurons == 65, "of 128, 63 stand for two"


def test_matched_neurons_lose_less_than_random_ones(tiny, folder, monkeypatch):
    dense, recipe = twins(tiny, folder, "noisy", 0.3), asked(folder, "noisy", ffn_ratio=0.5, mac_ratio=0.8)
    matched = difference(dense, convert_in_memory(build(recipe)).model)

    def at_random(a, b):
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randperm(len(one), generator=generator)[: min(len(a), len(b))] for one in (a, b))
        return first, second, matching.costs(a, b)[first, second]

    monkeypatch.setattr(matching, "match", at_random)
    assert matched < 0.8 * difference(dense, convert_in_memory(build(recipe)).model)


@pytest.mark.parametrize(("family", "ratio", "macs"), [("bert", 0.5, 0.7), ("phi3", 0.4, 0.9), ("gpt2", 0.3, 0.4)])
def test_budgets_are_spent_and_the_folder_computes_what_was_converted(tiny, folder, tmp_path, family, ratio, macs):
    if not (folder / family).exists():
        tiny.save_tiny(family, folder / family)
    recipe = build(asked(folder, family, ffn_ratio=ratio, mac_ratio=macs))
    report = convert(recipe, tmp_path / "out")
    saved = checkpoint.load_model(str(tmp_path / "out"))
    size = ffn_size(layout_of(saved))
    assert size.stored / size.dense_stored == report.ffn.stored_ratio == pytest.approx(ratio, abs=0.01)
    assert size.macs / size.dense_macs == report.ffn.mac_ratio == pytest.approx(macs, abs=0.01)
    assert torch.equal(outputs(saved), outputs(convert_in_memory(recipe).model))
    if family != "phi3":  # which has no place for biases before the activation
        torch.testing.assert_close(outputs(to_dense(copy.deepcopy(saved))), outputs(saved), rtol=1e-4, atol=1e-4)
    users = [share * 3 for usage in report.banks for share in usage.selected_share]
    assert sum(count > 1.5 for count in users) == report.ffn.shared_primitives > 0
    shown = anatomy(str(tmp_path / "out"))
    assert sum(one.neurons for one in shown.projections if one.role == "down") == pytest.approx(3 * 64 * macs, abs=2)
    assert BankDiagnostics(saved)()["dead_share"] == 0


def test_an_interrupted_conversion_continues_with_its_fitted_bank(tiny, folder, tmp_path, monkeypatch):
    if not (folder / "bert").exists():
        tiny.save_tiny("bert", folder / "bert")
    recipe = build(asked(folder, "bert", ffn_ratio=0.5, mac_ratio=0.7))
    whole = convert_in_memory(recipe).model

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(recipe, tmp_path / "out")
    monkeypatch.setattr(bank_fit, "_joint", killed)
    convert(recipe, tmp_path / "out")
    assert torch.equal(outputs(checkpoint.load_model(str(tmp_path / "out"))), outputs(whole))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"budget": {"share": "none"}}, "budget.primitive: has no effect with budget.share none"),
        ({"budget": {"share": "auto"}}, "set budget.share always"),
        ({"budget": {"neurons": False}}, "budget.neurons: has no effect with budget.primitive neurons"),
        ({"budget": {"mac_ratio": 0.5}}, "budget.mac_ratio: leaves no MACs for sharing"),
        ({"budget": {"optimize": "compute"}}, "budget.optimize: leaves no MACs for sharing"),
        ({"form": {"elastic": True}}, "form.elastic: a shared bank has no order"),
        ({"form": {"bank_dtype": "int4"}}, "form.bank_dtype: banks of neurons are not quantised"),
    ],
)
def test_options_without_meaning_are_refused_in_one_line(folder, more, line):
    recipe = asked(folder, "bert", ffn_ratio=0.5)
    with pytest.raises(BadInput) as refused:
        build({**recipe, **more, "budget": {**recipe["budget"], **more.get("budget", {})}})
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_ratios_that_cannot_be_spent_end_the_command_with_one_line(tiny, folder, cli, tmp_path):
    twins(tiny, folder, "pair")
    words = ["--primitive", "neurons", "--share", "always", "--ffn-ratio", 0.2, "--mac-ratio", 0.8]
    text = ["--calibration", folder / "text.txt", "--samples", 16, "--sequence-length", 32, "--eval-data", "none"]
    ended = cli("convert", folder / "pair", "-o", tmp_path / "out", *words, *text, code=2)
    assert "lower --mac-ratio, or make bands longer" in ended.stderr and not (tmp_path / "out").exists()
