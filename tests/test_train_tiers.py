"""Training in tiers: hot primitives learn as resident ones do, cold ones rest; promotions, resume, refusals."""

import copy
import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pilon_compress.config import training
from pilon_compress.config.tiers import TrainingTier
from pilon_compress.config.training_sections import Optimizer
from pilon_compress.errors import BadInput
from pilon_compress.models import base_architectures, checkpoint, layouts
from pilon_compress.models.families import find_sites
from pilon_compress.nn.installed import banks
from pilon_compress.optimize.optimizers import make_optimizers
from pilon_compress.tiers.modules import Tiered
from pilon_compress.train.promotion import Promotion, begin_tiers

SMALL = training.load("smoke", ["schedule.tokens=4096"])
X = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
WORDS = ["train", "--recipe", "smoke", "--tier", "n_hot=0.25,every=2,margin=0", "--set", "device=cpu", "--json"]


def built(**ffn):
    """A model from scratch whose banks six layers share."""
    host = SMALL.host.model_copy(update={"num_hidden_layers": 6, "vocab_size": 64})
    asked = SMALL.ffn.model_copy(update={"share": "always", "ffn_ratio": 0.25, "mac_ratio": 0.5, **ffn})
    config = base_architectures.config_for(host, 64, 0)
    layout = layouts.layout_for(find_sites(checkpoint.empty_model(config)), asked)
    return base_architectures.build_with(config, layout, 0)


def loss_of(model):
    return model(X, labels=X).loss


@pytest.mark.parametrize("primitive", ["factors", "neurons"])
def test_hot_primitives_learn_as_those_of_the_resident_model(tmp_path, primitive):
    resident = built(primitive=primitive)
    tiered = copy.deepcopy(resident)
    begin_tiers(tiered, 0.25, tmp_path)
    assert any(isinstance(part, Tiered) for part in tiered.modules())
    asked = Optimizer(clip=None, weight_decay=0)
    for model in (resident, tiered):
        (optimizer,) = make_optimizers(model, asked)
        loss_of(model).backward()
        optimizer.step()
    before, after = built(primitive=primitive).state_dict(), tiered.state_dict()
    assert set(after) == set(before)
    places = {name: part for name, part in tiered.named_modules() if isinstance(part, Tiered)}
    for name, part in places.items():
        for leaf, axis in part.axes.items():
            key = f"{name}.{leaf}"
            hot = torch.zeros(part.tables[leaf].values.shape[axis], dtype=torch.bool).index_fill(0, part.hot, True)
            rows = [tensor[key].movedim(axis, 0) for tensor in (before, resident.state_dict(), after)]
            assert torch.equal(rows[2][hot], rows[1][hot]), "hot ones learn as resident ones"
            assert torch.equal(rows[2][~hot], rows[0][~hot]), "cold ones rest"
            assert not torch.equal(rows[2][hot], rows[0][hot])


@pytest.mark.parametrize("primitive", ["factors", "neurons"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_and_optimiser_states_move_with_a_primitive(tmp_path, primitive, name):
    model = built(primitive=primitive)
    begin_tiers(model, 0.25, tmp_path / "tables")
    optimizers = make_optimizers(model, Optimizer(name=name))
    promotion = Promotion(model, optimizers, TrainingTier(n_hot=0.25, every=1000, margin=0.0), tmp_path / "states")
    loss_of(model).backward()
    with promotion.around():
        for optimizer in optimizers:
            optimizer.step()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    part = promotion.parts[0]
    (leaf, axis), *_ = part.axes.items()
    optimizer, resting = promotion.states[id(part)][leaf]
    parameter = part.get_parameter(f"hot_{leaf}")
    key = next(iter(resting))
    old = int(part.hot[0])
    optimizer.state[parameter][key].normal_()
    moment = optimizer.state[parameter][key].select(axis, 0).clone()
    part.use.fill_(0).index_fill_(0, part.hot, 1.0)
    part.use[old] = 0.5
    newcomer = next(place for place in range(part.use.numel()) if place not in part.hot.tolist())
    part.use[newcomer] = 2.0
    assert promotion._promote(part) == 1 and int(part.hot[0]) == newcomer
    assert torch.equal(resting[key].values.select(axis, old), moment)
    assert not optimizer.state[parameter][key].select(axis, 0).any(), "it has never moved"
    assert all(torch.equal(value, weights[place]) for place, value in model.state_dict().items())
    part.use[newcomer], part.use[old] = 0.5, 2.0
    assert promotion._promote(part) == 1 and int(part.hot[0]) == old
    assert torch.equal(optimizer.state[parameter][key].select(axis, 0), moment), "and back"


def test_a_primitive_of_like_use_does_not_change_places(tmp_path):
    model = built()
    begin_tiers(model, 0.25, tmp_path / "tables")
    asked = TrainingTier(n_hot=0.25, margin=0.2)
    promotion = Promotion(model, make_optimizers(model, Optimizer()), asked, tmp_path / "states")
    part = promotion.parts[0]
    part.use.fill_(1.1).index_fill_(0, part.hot, 1.0)
    assert promotion._promote(part) == 0
    part.use.fill_(1.3).index_fill_(0, part.hot, 1.0)
    assert promotion._promote(part) == min(part.hot.numel(), part.use.numel() - part.hot.numel())


def test_use_is_what_the_loss_would_lose_to_first_order(tmp_path):
    """Cold primitives have it, too: against the loss with a primitive's coefficients a little smaller."""
    model = built().double()
    begin_tiers(model, 0.25, tmp_path / "tables")
    promotion = Promotion(model, make_optimizers(model, Optimizer()), TrainingTier(n_hot=0.25), tmp_path / "states")

    def loss_of(model):  # in float64 throughout
        return model(X).logits.square().mean()

    loss = loss_of(model)
    loss.backward()
    layer = promotion.factors[0]
    part = layer.bank
    users = [one for one in promotion.factors if one.bank is part]
    found = next(use for bank, use in promotion._uses() if bank is part)
    place = next(int(one) for one in layer.selected if int(one) not in part.hot.tolist())
    total = 0.0
    for user in users:
        for slot in (user.selected == place).nonzero()[:, 0]:
            for component in range(user.weight.shape[1]):
                with torch.no_grad():
                    kept = user.weight[slot, component].clone()
                    user.weight[slot, component] = kept * (1 - 1e-2)
                    total += abs(float(loss - loss_of(model))) / 1e-2
                    user.weight[slot, component] = kept
    assert float(found[place]) == pytest.approx(total, rel=0.05)


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize("primitive", ["factors", "neurons"])
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(cli, text_cache, tmp_path, primitive):
    words = (
        *WORDS,
        "--primitive",
        primitive,
        "--share",
        "always",
        "--tokens",
        "24576",
        "--set",
        "run.checkpoint_every=0.01",
    )
    whole = json.loads(cli.start(*words, "-o", "whole", cwd=tmp_path, PILON_CACHE=text_cache).end().stdout)
    assert whole["tiers"]["promoted"] > 0 and whole["tiers"]["hot"] < whole["tiers"]["cold"]
    process = cli.start(*words, "-o", "out", cwd=tmp_path, PILON_CACHE=text_cache)
    while not list((tmp_path / "out").glob("checkpoints/step-*/state.json")):
        assert process.poll() is None, process.end()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.end(143)
    cli.start(*words, "-o", "out", "--resume", cwd=tmp_path, PILON_CACHE=text_cache).end()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "out/checkpoints/tiers").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any(isinstance(part, Tiered) for part in model.modules())
    assert not list(banks(model)) or primitive == "factors"
    if primitive == "factors":
        words = ("eval", "out", "--data", "stdlib:topics", "--samples", "4", "--json")
        tiered, plain = (cli.start(*words, *more, cwd=tmp_path).end().stdout for more in (("--tier", "n_hot=0.5"), ()))
        assert json.loads(tiered)["perplexity"] == json.loads(plain)["perplexity"]
        words = ("generate", "out", "-p", "The", "--max-new-tokens", "8")
        tiered, plain = (cli.start(*words, *more, cwd=tmp_path).end().stdout for more in (("--tier", "n_hot=0.5"), ()))
        assert tiered == plain != ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ffn.kind=lowrank"], "ffn.kind lowrank"),
        (["ffn.composition=softmax"], "component or scalar"),
        (["ffn.primitive=neurons", "ffn.share=always", "ffn.scales=false"], "scales of neurons"),
        (["ternary.enabled=true"], "ternary.enabled"),
        (["run.compile=true"], "run.compile"),
        (["run.train=compositions"], "run.train compositions"),
        (["ffn.dense_until=0.5"], "ffn.dense_until"),
        (["run.tier.n_hot=1.5"], "n_hot"),
        (["run.tier={every: 3}"], "n_hot"),
    ],
)
def test_what_does_not_go_with_tiers_is_refused_in_one_line(overrides, message):
    with pytest.raises(BadInput, match=message) as refusal:
        training.load("smoke", ["run.tier={n_hot: 0.25}", *overrides])
    assert "\n" not in str(refusal.value)


def test_a_share_alone_is_that_of_hot_primitives():
    assert training.load("smoke", ["run.tier=0.25"]).run.tier == TrainingTier(n_hot=0.25)


def test_healing_keeps_the_last_weights():
    words = {"task": "heal", "start": "m", "run": {"tier": "n_hot=0.25"}}
    with pytest.raises(BadInput, match="keep_best to false"):
        training.build(words)
    assert training.build({**words, "distill": {"keep_best": False}}).run.tier.n_hot == 0.25


def test_a_bank_too_small_to_share_out_is_refused_before_anything_is_written(cli, text_cache, tmp_path):
    words = ("--tier", "n_hot=0.99", "-o", "out", "--tokens", "4096")
    err = cli.start("train", "--recipe", "smoke", *words, cwd=tmp_path, PILON_CACHE=text_cache).end(2).stderr
    assert err.strip().splitlines()[-1].startswith("error: n_hot 0.99 leaves nothing cold")
    assert not (tmp_path / "out").exists()
