"""The original's schedules: each one is shown to do what it says, and to compile nothing anew."""

import pytest
import torch

from pilon_compress.config import training
from pilon_compress.errors import BadInput
from pilon_compress.models import base_architectures
from pilon_compress.nn.installed import banks, projections
from pilon_compress.optimize.callbacks import extensions
from pilon_compress.optimize.optimizers import make_optimizers
from pilon_compress.research.original.moving_linear import settle, staged
from pilon_compress.research.original.rates import entropy, similarity, use_of
from pilon_compress.research.original.selection import ramp
from pilon_compress.train.freeze_unused import FreezeUnused
from pilon_compress.train.pipeline import callbacks_for
from pilon_compress.train.preflight import layout_asked

STEPS = 20
IDS = torch.arange(24).reshape(2, 12) % 40
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 40}
FFN = {"rank": 4, "n_primitives": 8, "top_k": 3, "bands": 2, "ffn_ratio": 1, "mac_ratio": 1}
PHASES = [0.2, 0.5, 1.0]


class Twin:
    """A model with its optimisers and callbacks, as the pipeline makes them; `step` is one step of the loop."""

    def __init__(self, composition="component", explore="none", optimizer=None, layers=4, **asked):
        shape, ffn = {**SHAPE, "num_hidden_layers": layers}, {**FFN, "composition": composition, "bands": layers // 2}
        explored = {} if explore == "none" else {"selection": {"explore": explore, "until": 0.5}}
        original = {"staged": asked, **explored}
        data = {"task": "pretrain", "host": shape, "ffn": ffn, "research": {"original": original}}
        data |= {"optimizer": optimizer or {}}
        self.recipe = training.build(data)
        config = base_architectures.config_for(self.recipe.host, 32, 0)
        self.model = base_architectures.build_with(config, layout_asked(self.recipe, config), self.recipe.seed)
        for extension in extensions(self.recipe):
            extension.stage(self.model)
        self.optimizers = make_optimizers(self.model, self.recipe.optimizer)
        self.callbacks = callbacks_for(self.recipe, self.model, self.optimizers, STEPS)
        self.layers = [layer for _, layer in projections(self.model)]

    def before(self, step):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"]
        for callback in self.callbacks:
            callback.before(step, step / STEPS)

    def backward(self):
        self.model.zero_grad(set_to_none=True)
        extra = [term for term in (callback.penalty() for callback in self.callbacks) if term is not None]
        (self.model(IDS, labels=IDS).loss + sum(extra)).backward()

    def step(self, step):
        self.before(step)
        self.backward()
        masks = [callback.around() for callback in self.callbacks if isinstance(callback, FreezeUnused)]
        for mask in masks:
            mask.__enter__()
        for optimizer in self.optimizers:
            optimizer.step()
        for mask in masks:
            mask.__exit__(None, None, None)

    def rates(self):
        return {group["name"]: group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups}

    def values(self, group):
        found = [g["params"] for optimizer in self.optimizers for g in optimizer.param_groups if g["name"] == group]
        return [parameter.detach().clone() for parameters in found for parameter in parameters]


# --- phases


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_phase_has_its_own_rates_and_a_rate_of_0_freezes(optimizer):
    rates = {"banks": [12, 0, 0.5], "compositions": [0, 2, 1], "base": [1, 0.75, 0.5]}
    twin = Twin(phases=PHASES, **rates, optimizer={"name": optimizer, "weight_decay": 0.5})
    base = {group["name"]: group["base_lr"] for o in twin.optimizers for group in o.param_groups}
    for step, phase in [(0, 0), (3, 0), (4, 1), (9, 1), (10, 2), (19, 2)]:
        before = {name: twin.values(name) for name in ("banks", "compositions", "matrices")}
        twin.step(step)
        for name, rate in twin.rates().items():
            factor = rates[name if name in rates else "base"][phase]
            assert rate == pytest.approx(base[name] * factor)
        for name, old in before.items():
            factor = rates[name if name in rates else "base"][phase]
            same = [torch.equal(a, b) for a, b in zip(old, twin.values(name), strict=True)]
            assert all(same) if factor == 0 else not any(same), (name, step)


def test_the_banks_of_a_band_learn_as_soon_as_their_band_does_and_not_before():
    twin = Twin(unfreeze=[0.0, 0.5], optimizer={"weight_decay": 0.5})
    by_band = {
        band: [b.A for name, b in banks(twin.model) if name.startswith(band)]
        + [layer.weight for layer in twin.layers if any(layer.bank is b for n, b in banks(twin.model) if n[:5] == band)]
        for band in ("band0", "band1")
    }
    for step in (0, 9, 10):
        before = {band: [p.detach().clone() for p in own] for band, own in by_band.items()}
        twin.step(step)
        for band, own in by_band.items():
            same = [torch.equal(a, b) for a, b in zip(before[band], own, strict=True)]
            assert all(same) if band == "band1" and step < 10 else not any(same)


def test_every_parameter_is_in_one_group_after_the_split():
    twin = Twin(unfreeze=[0.0, 0.5], optimizer={"name": "muon"})
    found = [id(p) for o in twin.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in twin.model.parameters())


# --- rank, primitives, top-k

CHOOSING = [("softmax", "none"), ("component", "anneal"), ("scalar", "gumbel")]


def test_a_ramp_holds_moves_and_ends():
    assert [ramp(share, [0.2, 0.5, 1.0], [2, 8, 8]) for share in (0, 0.2, 0.35, 0.5, 0.9)] == [2, 2, 5, 8, 8]
    assert ramp(0.1, [1.0], [3]) == 3


@pytest.mark.parametrize("composition", ["component", "scalar", "softmax"])
def test_components_beyond_the_active_rank_contribute_nothing_and_get_no_gradient(composition):
    twin = Twin(composition, phases=PHASES, rank=[1, 4, 4])
    x = torch.randn(3, 32)
    for step, active in [(0, 1), (7, 2), (10, 4)]:
        twin.before(step)
        layer = next(layer for layer in twin.layers if layer.bank.d_in == 32)
        twin.backward()
        for _, bank in banks(twin.model):
            assert (bank.A.grad[:, :, active:] == 0).all() and (bank.B.grad[:, active:] == 0).all()
            assert (bank.A.grad[:, :, :active] != 0).any()
        with torch.no_grad():
            before, kept = layer(x), layer.bank.A.clone()
            layer.bank.A[:, :, active:] += 1
            assert torch.equal(layer(x), before)
            layer.bank.A.copy_(kept)
            layer.bank.A[:, :, active - 1] += 1
            assert not torch.equal(layer(x), before)
            layer.bank.A.copy_(kept)


def test_components_beyond_the_active_rank_keep_their_bits_through_the_optimiser():
    twin = Twin(phases=PHASES, rank=[2, 4, 4], optimizer={"weight_decay": 0.5})
    before = {name: bank.A.detach().clone() for name, bank in banks(twin.model)}
    for step in range(4):
        twin.step(step)
    for name, bank in banks(twin.model):
        assert torch.equal(bank.A[:, :, 2:], before[name][:, :, 2:])
        assert not torch.equal(bank.A[:, :, :2], before[name][:, :, :2])


@pytest.mark.parametrize(
    ("composition", "explore"), [("softmax", "none"), ("component", "anneal"), ("scalar", "gumbel")]
)
def test_primitives_come_into_use_as_scheduled(composition, explore):
    twin = Twin(composition, explore, phases=PHASES, n_primitives=[2, 6, 8])
    for step, among in [(0, 2), (7, 4), (10, 6), (15, 7)]:
        twin.before(step)
        twin.backward()
        for layer in twin.layers:
            assert not layer.used()[among:].any() and layer.used()[:among].any()
        for _, bank in banks(twin.model):
            assert (bank.A.grad[among:] == 0).all()


@pytest.mark.parametrize(
    ("composition", "explore"), [("softmax", "none"), ("component", "anneal"), ("scalar", "gumbel")]
)
def test_top_k_warms_up_and_anneals(composition, explore):
    twin = Twin(composition, explore, phases=PHASES, top_k=[8, 4, 3])
    for step, count in [(0, 8), (7, 6), (10, 4), (18, 3)]:
        twin.before(step)
        assert {int(layer.used().sum()) for layer in twin.layers} == {count}


def test_a_softmax_over_more_candidates_is_the_plain_one_over_as_many():
    twin = Twin("softmax", phases=PHASES, top_k=[8, 4, 3])
    plain = Twin("softmax").model
    twin.model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for step, count in [(0, 8), (10, 4), (19, 3)]:
            twin.before(step)
            for _, layer in projections(plain):
                layer.top_k = count
            assert torch.allclose(twin.model(IDS).logits, plain(IDS).logits, atol=1e-6)
        settle(twin.model)
        assert torch.equal(twin.model(IDS).logits, plain(IDS).logits)
    assert not list(staged(twin.model)) and twin.model.state_dict().keys() == plain.state_dict().keys()


def test_a_cached_selection_is_kept_for_its_steps():
    twin = Twin("softmax", cache_top_k=3)
    layer = twin.layers[0]
    seen = []
    for step in range(9):
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[step % 8] = 5.0
        twin.before(step)
        assert layer.selected.shape == (3,)
        seen.append(int(layer.selected[0]))
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6, 6]


@pytest.mark.parametrize(
    ("composition", "asked"),
    [
        ("component", {"rank": [1, 2, 4]}),
        ("softmax", {"top_k": [8, 4, 3], "n_primitives": [3, 8, 8], "rank": [1, 4, 4], "cache_top_k": 2}),
        ("softmax", {"banks": [12, 0, 0], "compositions": [0, 2, 1], "base": [1, 1, 0.5], "unfreeze": [0.3]}),
    ],
)
def test_no_schedule_compiles_anything_anew(composition, asked):
    torch._dynamo.reset()
    twin = Twin(composition, layers=2, phases=PHASES, **asked)
    run = torch.compile(twin.model.base_model, backend="eager", dynamic=False)
    for step in range(0, STEPS, 3):
        twin.before(step)
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            run(IDS).last_hidden_state.sum().backward()
        with torch.no_grad():
            assert torch.allclose(run(IDS).last_hidden_state, twin.model.base_model(IDS).last_hidden_state, atol=1e-6)


# --- regularisers


@pytest.mark.parametrize(("composition", "explore"), [("component", "none"), ("scalar", "gumbel"), ("softmax", "none")])
def test_the_entropy_regulariser_raises_entropy(composition, explore):
    def after(weight):
        twin = Twin(composition, explore, entropy=weight, optimizer={"learning_rate": 0.05})
        with torch.no_grad():
            for layer in twin.layers:
                layer.weight[0] = 3.0
                layer.weight[1:].mul_(0.5)
        for step in range(10, 16):
            twin.step(step)
        return float(torch.stack([entropy(use_of(layer)) for layer in twin.layers]).mean().detach())

    assert after(1.0) > after(0.0) + 0.02


@pytest.mark.parametrize("composition", ["component", "softmax"])
def test_the_diversity_regulariser_lowers_the_cosine_within_a_band(composition):
    def after(weight):
        twin = Twin(composition, diversity=weight, optimizer={"learning_rate": 0.05})
        with torch.no_grad():
            for layer in twin.layers:
                layer.weight[:2] = 2.0
                if composition != "softmax":
                    layer.selected.copy_(torch.arange(3))
        for step in range(16):
            twin.step(step)
        bands = [[layer for layer in twin.layers if layer.bank is bank] for _, bank in banks(twin.model)]
        return float(torch.stack([similarity(layers) for layers in bands]).mean().detach())

    assert after(1.0) < after(0.0) - 0.01


def test_entropy_and_similarity_of_known_compositions():
    twin = Twin("component")
    first, second = [layer for layer in twin.layers if layer.bank is twin.layers[0].bank]
    with torch.no_grad():
        first.weight.fill_(2.0)
        first.selected.copy_(torch.tensor([0, 1, 2]))
        second.weight.fill_(1.0)
        second.selected.copy_(torch.tensor([5, 6, 7]))
    assert float(entropy(use_of(first)).detach()) == pytest.approx(torch.tensor(3.0).log().item())
    assert float(similarity([first, second]).detach()) == pytest.approx(0, abs=1e-6)
    assert float(similarity([first, first]).detach()) == pytest.approx(1)


def test_schedules_that_do_not_fit_the_model_are_refused():
    with pytest.raises(BadInput, match="3 entries for 2 bands"):
        Twin(unfreeze=[0, 0.1, 0.2])
    with pytest.raises(BadInput, match="staged.top_k ends at 5"):
        Twin("softmax", phases=[1.0], top_k=[5])
    with pytest.raises(BadInput, match="entries for 1 phases"):
        Twin(phases=[1.0], banks=[1, 2])
