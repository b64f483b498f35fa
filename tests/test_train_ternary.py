"""Ternary training: one command makes a model that decodes as it was judged, whatever interrupts it, in one graph."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pilon_compress.config import training
from pilon_compress.distill.losses import NextToken
from pilon_compress.errors import BadInput
from pilon_compress.models import base_architectures
from pilon_compress.nn.additions import added
from pilon_compress.nn.formats.ternary import TernaryBank, TernaryLinear
from pilon_compress.nn.installed import banks, dense_matrices, layout_of, projections
from pilon_compress.nn.size import ffn_size
from pilon_compress.optimize.callbacks import extensions
from pilon_compress.optimize.monitor import read_metrics
from pilon_compress.optimize.optimizers import group_parameters, make_optimizers
from pilon_compress.train.pipeline import callbacks_for, plan, train_model
from pilon_compress.train.preflight import layout_asked
from pilon_compress.train.ternary.schedule import Rounding

SHORT = ("schedule.tokens=8192", "run.checkpoint_every=0.001", "run.keep=4", "device=cpu")  # 8 steps
WORDS = ["train", "--recipe", "smoke", "--ternary", "--json"]
WORDS += [word for item in (*SHORT, "research.bitnet.warmup=0.5") for word in ("--set", item)]
IDS = torch.randint(3, 500, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(cli):
    """`trained(folder, *words)`: what such a training there prints as JSON."""

    def trained(folder: Path, *words: str, processes: int = 1) -> dict:
        cache = str(folder / "tokens")
        if processes > 1:
            return json.loads(cli.together(*WORDS, *words, processes=processes, cwd=folder, PILON_CACHE=cache).stdout)
        return json.loads(cli(*WORDS, *words, cwd=folder, PILON_CACHE=cache).stdout)

    return trained


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ternary")
    return folder, trained(folder, "-o", "out")


def built(*overrides: str, bitnet=None, **ternary) -> tuple:
    """A small model from scratch, ternary unless told otherwise, and its recipe."""
    host = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    host |= {"intermediate_size": 96, "vocab_size": 500}
    asked = {"task": "pretrain", "host": host, "ternary": {"enabled": True, **ternary}}
    settings = training.build({**asked, "research": {"bitnet": bitnet or {}}}, list(overrides))
    config = base_architectures.config_for(settings.host, 32, 0)
    model = base_architectures.build_with(config, layout_asked(settings, config), 0)
    for extension in extensions(settings):
        extension.stage(model)
    return model, settings


# --- the whole road


def test_one_command_trains_a_ternary_model_that_loads_and_is_what_was_judged(undisturbed):
    folder, result = undisturbed
    assert result["ffn"]["stored_ratio"] <= 0.51 and result["val_perplexity"] < 450 < 512
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    found = dict(banks(model))
    assert len(found) == 4 and all(isinstance(bank, TernaryBank) for bank in found.values())
    groups = {name.rsplit(".", 1)[1]: layer.group for name, layer in projections(model)}
    assert groups == {"up_proj": 0, "down_proj": 128}
    lines = [line for line in read_metrics(folder / "out") if "zero_share" in line]
    assert lines and all(0.2 < line["zero_share"] < 0.7 for line in lines) and lines[-1]["flipped_share"] > 0
    assert "ternary" in (folder / "out/README.md").read_text() and "ternary" in (folder / "out/train.html").read_text()


def test_resumed_from_an_early_checkpoint_it_ends_with_the_same_bytes(trained, undisturbed, tmp_path):
    folder, expected = undisturbed
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out/config.json").unlink()
    early, *later = sorted((tmp_path / "out/checkpoints").glob("step-*"))
    for path in later:  # as if it had been killed after the fifth step
        shutil.rmtree(path)
    names = {name for path in early.glob("*.safetensors") for name in load_file(path)}
    assert early.name == "step-00000005" and not any("digits" in name for name in names), "digits are made, not kept"
    again = trained(tmp_path, "-o", "out", "--resume")
    assert again["val_perplexity"] == expected["val_perplexity"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(trained, undisturbed, parallel):
    folder, expected = undisturbed
    found = trained(folder, "-o", parallel, "--set", f"run.parallel={parallel}", processes=2)
    assert found["processes"] == 2 and found["tokens"] == expected["tokens"]
    assert found["val_perplexity"] == pytest.approx(expected["val_perplexity"], rel=5e-3)  # digits flip on a hair


# --- what a model computes


@pytest.mark.parametrize("family", ["arcee", "llama"])
@torch.no_grad()
def test_decoding_batches_and_prefixes_do_not_change_what_is_predicted(family):
    model, _ = built(f"host.family={family}", group=16, bitnet={"sub_norm": True})
    model.eval()
    whole = model(IDS).logits
    alone = model(IDS[1:2]).logits
    prefix = model(IDS[:, :11]).logits
    past, steps = None, []
    for place in range(IDS.shape[1]):
        found = model(IDS[:, place : place + 1], past_key_values=past, use_cache=True)
        past = found.past_key_values
        steps.append(found.logits)
    pairs = (alone, whole[1:2]), (prefix, whole[:, :11]), (torch.cat(steps, 1), whole)
    for ours, theirs in pairs:
        apart = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        # attention sums in another order, and a code on the edge may fall to the other side: one in 127 of one number
        assert apart.median() < 1e-5 and apart.max() < 0.02


def test_dense_hosts_are_ternary_one_flag_away_and_norms_can_be_alike():
    model, _ = built("ffn.kind=dense", bitnet={"sub_norm": True})
    layers = dict(dense_matrices(model))
    assert len(layers) == 12 and all(isinstance(layer, TernaryLinear) for layer in layers.values())
    assert {name.rsplit(".", 1)[1] for name, layer in layers.items() if added(layer)} == {"down_proj"}
    for kind in ("pilon", "lowrank", "dense"):
        model, _ = built(f"ffn.kind={kind}", enabled=False, bitnet={"sub_norm": True})
        assert not layout_of(model).is_ternary and len([n for n in model.state_dict() if "norm.weight" in n]) == 4 + 9
    model, _ = built("ffn.kind=dense", enabled=False)
    assert not layout_of(model).matrices


@pytest.mark.parametrize("kind", ["pilon", "dense"])
@torch.no_grad()
def test_outputs_start_as_large_as_those_of_dense_weights(kind):
    model, _ = built(f"ffn.kind={kind}", "host.hidden_size=64", "host.intermediate_size=256")
    model.eval()
    x = torch.randn(200, 64)
    layers = [layer for name, layer in (*projections(model), *dense_matrices(model)) if "up_proj" in name]
    sizes = torch.stack([layer(x).std() for layer in layers])
    assert sizes.mean() == pytest.approx(0.02 * 8, rel=0.15)


# --- how it is trained


def test_one_graph_for_all_steps():
    torch._dynamo.reset()
    model, settings = built("host.num_hidden_layers=2", bitnet={"warmup": 0.5})
    trainee, graphs = NextToken(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    optimizers = make_optimizers(trainee, settings.optimizer)
    callbacks = callbacks_for(settings, model, optimizers, 6)
    run = torch.compile(trainee, backend=backend, dynamic=False, fullgraph=True)
    model.config.use_cache = False
    for step in range(6):
        for callback in callbacks:
            callback.before(step, step / 6)
        for _ in range(2):  # micro batches
            run({"input_ids": IDS}, IDS).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(graphs) == 1


def test_digits_are_made_once_per_step_and_gradients_reach_all_that_learns(monkeypatch):
    made = []
    plain = TernaryBank.hold
    monkeypatch.setattr(TernaryBank, "hold", lambda bank: (made.append(bank), plain(bank)))
    model, settings = built()
    trainee = NextToken(model.eval())
    optimizers = make_optimizers(trainee, settings.optimizer)
    rounding = Rounding.of(model, settings, optimizers)
    rounding.before(0, 0.0)
    held = [(bank, bank.A_digits.clone()) for _, bank in banks(model)]
    for _ in range(2):
        trainee({"input_ids": IDS, "use_cache": False}, IDS).backward()
    assert len(made) == len(held), "once for each bank"
    assert all(parameter.grad is not None for parameter in model.parameters())
    names = group_parameters(model)["banks"]
    assert len(names) == 2 * len(held)
    assert all(parameter.grad.abs().max() > 0 for parameter in names.values())
    for optimizer in optimizers:
        optimizer.step()
    rounding.before(1, 0.5)
    assert any(not torch.equal(bank.A_digits, before) for bank, before in held)


def test_the_second_stage_has_its_own_rate_and_no_weight_decay():
    model, settings = built(bitnet={"second": 0.7, "second_rate": 0.25})
    optimizers = make_optimizers(model, settings.optimizer)
    callbacks, decays, rates = callbacks_for(settings, model, optimizers, 10), [], []
    for share in (0.69, 0.7):
        for callback in callbacks:
            callback.before(0, share)
        decays.append({group["name"]: group["weight_decay"] for o in optimizers for group in o.param_groups})
        rates.append({group["name"]: group["lr"] for o in optimizers for group in o.param_groups})
    assert decays[0]["banks"] == 0.1 and not any(decays[1].values())
    assert rates[1] == {name: 0.25 * rate for name, rate in rates[0].items()}


def test_weight_decay_ends_half_way_through_a_ternary_training():
    model, settings = built()
    optimizers = make_optimizers(model, settings.optimizer)
    rounding, decays = Rounding.of(model, settings, optimizers), []
    for share in (0.49, 0.5):
        rounding.before(0, share)
        decays.append([group["weight_decay"] for o in optimizers for group in o.param_groups])
    assert any(decays[0]) and not any(decays[1])
    assert training.build({"task": "pretrain"}).weight_decay_ends == 1


def test_rounding_takes_hold_little_by_little():
    model, settings = built(bitnet={"warmup": 0.5})
    callbacks = callbacks_for(settings, model, make_optimizers(model, settings.optimizer), 10)
    bank = next(bank for _, bank in banks(model))
    apart = []
    for share in (0.0, 0.25, 0.5, 1.0):
        for callback in callbacks:
            callback.before(0, share)
        apart.append(float((bank.A_digits - bank.A_digits.round()).abs().max()))
    assert apart[0] > apart[1] > apart[2] == apart[3] == 0
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()
    assert not any("digits" in name or "strength" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "sft", "start": "x", "ternary": {"enabled": True}}, "for pretrain and heal"),
        ({"task": "heal", "start": "x", "research": {"bitnet": {"sub_norm": True}}}, "for models from scratch"),
        (
            {
                "task": "pretrain",
                "ffn": {"dense_until": 0.5},
                "schedule": {"tokens": 9},
                "research": {"bitnet": {"sub_norm": True}},
            },
            "ffn.dense_until 0",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(data, message):
    with pytest.raises(BadInput, match=message):
        training.build(data)


def test_plans_of_ternary_models_are_the_same_size():
    words = [["ffn.rank=8", f"ternary.enabled={asked}"] for asked in ("false", "true")]
    plain, ternary = (plan(training.load("smoke", each)).dump() for each in words)
    assert plain["ffn"]["stored_ratio"] == ternary["ffn"]["stored_ratio"]


@pytest.mark.parametrize("more", ["ffn.kind=pilon", "ffn.kind=lowrank", "ffn.n_primitives=2", "ffn.ffn_ratio=0.9"])
@pytest.mark.parametrize("recipe", ["smoke", "tiny", "48m"])
def test_open_ranks_are_multiples_of_16_within_the_budget(recipe, more):
    more = ["ffn.share=auto", "ffn.ffn_ratio=0.5", "ffn.mac_ratio=0.5", more]  # shared banks meet both by any rank
    asked = training.load(recipe, ["ternary.enabled=true", "ffn.dense_until=0", *more])
    config = base_architectures.config_for(asked.host, asked.data.sequence_length, None)
    layout = layout_asked(asked, config)
    assert layout.banks and all(bank.rank % 16 == 0 for bank in layout.banks.values())
    sizes = ffn_size(layout).over_dense()
    assert sizes.stored_ratio <= asked.ffn.ffn_ratio and sizes.mac_ratio <= asked.ffn.macs


def test_a_budget_too_small_for_rank_16_gets_what_it_pays_for_and_one_that_is_not_spent_says_so(said):
    tight = layout_asked(*small_recipe("ffn.mac_ratio=0.2"))
    assert all(0 < bank.rank < 16 for bank in tight.banks.values())
    assert said() == []
    assert all(bank.rank == 16 for bank in layout_asked(*small_recipe()).banks.values())
    (line,) = said()
    assert "0.31 of the dense numbers are stored; --set ffn.rank=8 would store 0.47" in line


def small_recipe(*overrides):
    asked = training.load("smoke", ["ternary.enabled=true", *overrides])
    return asked, base_architectures.config_for(asked.host, asked.data.sequence_length, None)


def test_a_selection_that_explores_can_be_ternary(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("PILON_CACHE", str(undisturbed[0] / "tokens"))
    words = ["schedule.tokens=4096", "ternary.enabled=true", "research.bitnet.sub_norm=true"]
    words += ["research.original.selection.explore=anneal", "ffn.rank=4", "ffn.n_primitives=12", "ffn.top_k=3"]
    result = train_model(training.load("smoke", words), tmp_path / "out", quiet=True).dump()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(layer.group == 128 for name, layer in projections(model) if "down" in name)
    assert sum("norm.weight" in name and "mlp" in name for name in model.state_dict()) == 4
    assert result["val_perplexity"] < 500
