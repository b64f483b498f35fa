"""Check bank diagnostics on known compositions."""

import math

import pytest
import torch

from pilon_compress.config import training
from pilon_compress.models import base_architectures
from pilon_compress.nn.installed import banks, projections
from pilon_compress.optimize.optimizers import learning, make_optimizers
from pilon_compress.research.original.moving_linear import settle, staged
from pilon_compress.research.original.selection import SelectionSchedule, stage
from pilon_compress.train.bank_diagnostics import BankDiagnostics
from pilon_compress.train.preflight import layout_asked

IDS = torch.arange(24).reshape(2, 12) % 40
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
FFN = {"rank": 2, "n_primitives": 8, "top_k": 3, "bands": 1, "ffn_ratio": 1, "mac_ratio": 1}


def built(composition="component", explore="none", **sections):
    ffn = {**FFN, "composition": composition}
    original = {"selection": {"explore": explore}, **sections}
    settings = training.build({"task": "pretrain", "host": SHAPE, "ffn": ffn, "research": {"original": original}})
    config = base_architectures.config_for(settings.host, 32, 0)
    model = base_architectures.build_with(config, layout_asked(settings, config), settings.seed)
    stage(model, settings.research.sections["original"], settings.seed)
    return model, settings


def even(model):
    """Make all primitives of one size, and every layer's weights 1."""
    with torch.no_grad():
        for _, bank in banks(model):
            bank.A.fill_(1.0)
            bank.B.fill_(1.0)
        for _, layer in projections(model):
            layer.weight.fill_(1.0)


def learn(model, settings, health):
    model(IDS, labels=IDS).loss.backward()
    with health.around():
        pass
    return {name: len(found) for name, found in learning(make_optimizers(model, settings.optimizer)).items()}


def test_even_compositions_have_the_entropy_of_k_of_n():
    model, _ = built()
    even(model)
    found = BankDiagnostics(model)()
    # two layers select 3 of 8 each, by turns: 0-2 and 3-5
    assert found["composition_entropy"] == pytest.approx(math.log(3) / math.log(8))
    assert found["primitive_entropy"] == pytest.approx(math.log(6) / math.log(8))
    assert found["primitive_gini"] == pytest.approx(0.25)
    assert found["utilisation"] == pytest.approx(6 / 8)
    assert found["dead_share"] == pytest.approx(2 / 8)


def test_one_primitive_that_does_all_has_entropy_0():
    model, _ = built()
    even(model)
    with torch.no_grad():
        for _, layer in projections(model):
            layer.selected.copy_(torch.arange(3))
            layer.weight[1:] = 0
    found = BankDiagnostics(model)()
    assert found["composition_entropy"] == found["primitive_entropy"] == 0
    assert found["primitive_gini"] == pytest.approx(7 / 8)
    assert found["utilisation"] == pytest.approx(3 / 8)


def test_selected_primitives_without_a_gradient_since_the_last_look_are_dead():
    model, settings = built()
    health = BankDiagnostics(model)
    for step in range(2):
        model.zero_grad()
        learn(model, settings, health)
        for _, bank in banks(model):
            bank.B.grad[1] = 0
            if step:
                bank.B.grad[2] = 0
    assert health()["dead_share"] == pytest.approx(2 / 8)  # the gradients were there when they were looked at
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for _, bank in banks(model):
        bank.B.grad[1] = 0
    with health.around():
        pass
    assert health()["dead_share"] == pytest.approx(3 / 8)
    assert health()["dead_share"] == pytest.approx(2 / 8), "a look begins anew"


@pytest.mark.parametrize(
    ("composition", "explore"), [("component", "anneal"), ("scalar", "gumbel"), ("softmax", "none")]
)
def test_energies_are_those_of_the_model_that_is_left(composition, explore):
    model, settings = built(composition, explore, staged={"phases": [1.0], "rank": [2]})
    choosing = SelectionSchedule(model, settings.research.sections["original"], settings.seed, 10)
    for step in (4, 9):
        choosing.before(step, step / 10)
    before = [layer.energy() for _, layer in staged(model)]
    figures = BankDiagnostics(model)()
    settle(model)
    after = [layer.energy() for _, layer in projections(model)]
    assert before and all(torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    assert BankDiagnostics(model)() == pytest.approx(figures)
    for energy, (_, layer) in zip(after, projections(model), strict=True):
        assert int((energy > 0).sum()) == layer.top_k == 3


def test_looking_while_all_primitives_take_part():
    model, settings = built("component", "anneal")
    SelectionSchedule(model, settings.research.sections["original"], settings.seed, 10).before(0, 0.0)
    found = BankDiagnostics(model)()
    assert found["utilisation"] == 1 and found["dead_share"] == 0
    assert 0.8 < found["composition_entropy"] < 1


def test_a_dense_model_has_no_figures():
    settings = training.build({"task": "pretrain", "host": SHAPE, "ffn": {"kind": "dense"}})
    config = base_architectures.config_for(settings.host, 32, 0)
    assert BankDiagnostics(base_architectures.build_with(config, layout_asked(settings, config), 0))() == {}


def test_frozen_groups_do_not_count_in_the_norm_that_is_clipped():
    model, settings = built()
    optimizers = make_optimizers(model, settings.optimizer)
    model(IDS, labels=IDS).loss.backward()
    assert set(learning(optimizers)) == {"banks", "compositions", "embeddings", "matrices", "vectors"}
    for group in optimizers[0].param_groups:
        group["lr"] = 0.0 if group["name"] == "banks" else group["lr"]
    assert "banks" not in learning(optimizers)
