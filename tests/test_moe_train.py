"""Training with experts: sizes within the budget, losses that spread tokens, runs that end, report and load."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pilon_compress.config import training
from pilon_compress.config.experts import ExpertsConfig
from pilon_compress.config.model import FfnConfig, HostConfig
from pilon_compress.config.training_calls import HealConfig, TrainConfig
from pilon_compress.config.training_sections import Optimizer
from pilon_compress.errors import BadInput
from pilon_compress.models import base_architectures, checkpoint, layouts
from pilon_compress.models.families import find_sites
from pilon_compress.nn.installed import neuron_projections, projections, routers
from pilon_compress.nn.size import ffn_size
from pilon_compress.optimize.optimizers import make_optimizers
from pilon_compress.parallel import lone
from pilon_compress.train.routing import RouterLosses, RoutingFigures, expert_similarity

SMALL = HostConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256, vocab_size=64)
X = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def config(family="arcee"):
    return base_architectures.config_for(SMALL.model_copy(update={"family": family}), 64, 0)


def built(ffn, family="arcee"):
    layout = layouts.layout_for(find_sites(checkpoint.empty_model(config(family))), ffn)
    return base_architectures.build_with(config(family), layout, 0)


def ffn(mix="outputs", **more):
    return FfnConfig(moe=ExpertsConfig(experts=4, top_k=2, mix=mix), **more)


@pytest.mark.parametrize("family", ["arcee", "llama"])
@pytest.mark.parametrize("share", ["none", "auto"])
@pytest.mark.parametrize(("stored", "macs"), [(0.5, 0.5), (0.5, 0.25), (0.25, 0.5)])
@pytest.mark.parametrize("primitive", ["factors", "neurons"])
@pytest.mark.parametrize("mix", ["outputs", "recipes"])
def test_experts_spend_the_budget_and_no_more(mix, primitive, stored, macs, share, family):
    asked = ffn(mix, primitive=primitive, ffn_ratio=stored, mac_ratio=macs, share=share)
    layout = layouts.layout_for(find_sites(checkpoint.empty_model(config(family))), asked)
    found = ffn_size(layout).over_dense()
    assert found.stored_ratio <= stored and found.mac_ratio <= macs and len(layout.routers) == 6
    # layers of one selection store no more than they compute, and compute no more than their own bank holds
    one = mix == "recipes"
    assert found.stored_ratio >= 0.75 * min(stored, macs if one else stored)
    assert found.mac_ratio >= 0.7 * min(macs, stored if one and share == "none" else macs)


def test_private_experts_are_disjoint_selections_of_a_bank():
    """The control: stored · top_k / experts MACs pay for a part of the bank that no other expert uses."""
    model = built(ffn(primitive="neurons", ffn_ratio=0.5, mac_ratio=0.25, share="none", scales=False))
    for _, layer in neuron_projections(model):
        selected = layer.selection.selected
        assert len(selected.unique()) == selected.numel(), "no neuron has two experts"
        assert selected.numel() >= 0.9 * layer.bank.neurons


def test_every_primitive_has_equally_many_experts():
    model = built(ffn(ffn_ratio=0.4, mac_ratio=0.4))
    uses = {}
    for _, layer in projections(model):
        counts = uses.setdefault(id(layer.bank), torch.zeros(layer.bank.n_primitives))
        counts += torch.bincount(layer.selected.flatten(), minlength=len(counts))
    for counts in uses.values():
        assert counts.max() - counts.min() <= 1 and counts.min() > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"moe": "experts=4,top_k=5"}, "top_k 5, more than its 4 experts"),
        ({"moe": "experts=1,top_k=1"}, "two experts or more"),
        ({"moe": "experts"}, "FIELD=VALUE"),
        ({"moe": "expert=4"}, "expert"),
        ({"moe": "top_k=2", "share": "always", "mac_ratio": 1.0}, "ffn.share always"),
        ({"moe": "top_k=2", "composition": "softmax"}, "composition"),
        ({"moe": "top_k=2", "dense_until": 0.5}, "dense_until"),
    ],
)
def test_contradictions_are_refused_in_one_line(words, message):
    with pytest.raises(BadInput, match=message) as refusal:
        training.build({"task": "pretrain", "ffn": words, "schedule": {"tokens": 1000}})
    assert "\n" not in str(refusal.value)


def test_python_programs_ask_for_experts_in_the_same_words():
    healing = HealConfig(moe={"experts": 4, "mix": "recipes"}).recipe("converted")
    assert healing.ffn.moe == ExpertsConfig(experts=4, mix="recipes") and healing.task == "heal"
    assert TrainConfig(ffn=ffn()).recipe(None).ffn.moe.experts == 4
    assert training.load("smoke", ["ffn.moe={experts: 4}"]).ffn.moe == ExpertsConfig(experts=4)
    with pytest.raises(BadInput, match="top_k 9"):
        HealConfig(moe="top_k=9")


def test_routers_learn_in_a_group_of_their_own_without_decay():
    model = built(ffn())
    groups = {
        group["name"]: group for one in make_optimizers(model, Optimizer(routers=0.5)) for group in one.param_groups
    }
    assert len(groups["routers"]["params"]) == 6 and groups["routers"]["weight_decay"] == 0
    assert groups["routers"]["lr"] == 0.5 * Optimizer().learning_rate


def test_the_losses_are_those_of_the_papers():
    model = built(ffn())
    losses = RouterLosses(model, ExpertsConfig(balance=0.5, z_loss=0.25), lone())
    assert losses.batch_penalty() is None, "no forward pass yet"
    with torch.no_grad():
        model(X)
    assert losses.batch_penalty() is None, "an evaluation adds nothing"
    inputs = {}
    for name, router in routers(model):
        router.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    model(X)
    expected = []
    for name, router in routers(model):
        logits = inputs[name] @ router.weight.T
        scores = logits.softmax(-1)
        share = torch.bincount(scores.topk(2).indices.flatten(), minlength=4) / (2 * len(scores))
        switch = 4 * sum(share[e] * scores[:, e].mean() for e in range(4))
        expected.append(0.5 * switch + 0.25 * torch.logsumexp(logits, -1).pow(2).mean())
    found = losses.batch_penalty()
    torch.testing.assert_close(found, torch.stack(expected).mean())
    found.backward()
    assert all(router.weight.grad.abs().sum() > 0 for _, router in routers(model))


def test_the_balance_sends_tokens_to_idle_experts():
    model = built(ffn())
    with torch.no_grad():
        for _, router in routers(model):
            router.weight.zero_()
            router.balance.copy_(torch.tensor([0.02, 0.01, 0.0, -0.01]))  # experts 0 and 1 have every token
    losses, figures = RouterLosses(model, ExpertsConfig(bias_rate=0.03), lone()), RoutingFigures(model, lone())
    busiest = []
    for step in range(2):
        losses.before(step, 0.0)
        model(X)
        with losses.around():
            pass
        report = figures.report()
        busiest.append(report.load_max)
        assert report.entropy == pytest.approx(1)  # of equal scores
    assert busiest == pytest.approx([2.0, 2.0])
    assert next(routers(model))[1].balance.argmax() in (2, 3) or next(routers(model))[1].balance.std() < 0.02


def test_similarity_is_one_where_experts_are_alike():
    model = built(ffn())
    assert abs(expert_similarity(model)) < 0.5
    with torch.no_grad():
        for _, layer in projections(model):
            layer.selected.copy_(layer.selected[:1].expand_as(layer.selected))
            layer.weight.copy_(layer.weight[:1].expand_as(layer.weight))
    assert expert_similarity(model) == pytest.approx(1)


RUNS = [
    ("experts=4,top_k=2", ()),
    ("experts=4,top_k=2,bias_rate=0.001", ("--primitive", "neurons")),
    ("experts=4,top_k=2,mix=recipes", ("--ternary",)),
]


@pytest.mark.parametrize(("moe", "more"), RUNS)
def test_a_run_ends_reports_and_loads(cli, tmp_path, moe, more):
    words = ("train", "--recipe", "smoke", "--moe", moe, "-o", "out", "--json", "--tokens", "4096")
    planned = json.loads(cli(*words, *more, "--dry-run", cwd=tmp_path).stdout)
    result = json.loads(cli(*words, *more, cwd=tmp_path).stdout)
    assert result["ffn"] == {**result["ffn"], **planned["ffn"]}
    routing = result["routing"]
    assert 0 < routing["entropy"] <= 1 and len(routing["load"]) == 4
    assert all(sum(load) == pytest.approx(1) and len(load) == 4 for load in routing["load"].values())
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert any("router_entropy" in line for line in lines) and any("gradient_norm_routers" in line for line in lines)
    assert "Busiest expert" in (tmp_path / "out/train.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(list(routers(model))) == 4
    found = json.loads(cli("inspect", "out", "--json", cwd=tmp_path).stdout)
    assert found["routing"]["similarity"] == routing["similarity"]
    assert any(float(router.balance.abs().max()) > 0 for _, router in routers(model)) == ("bias_rate" in moe)
