"""Refinement: the held-out loss falls, never rises, nothing else moves, and what goes wrong is undone."""

import copy
import math

import pytest
import torch

from pilon_compress.data.batch import Batch
from pilon_compress.distill import refine
from pilon_compress.distill.teacher import Teacher
from pilon_compress.errors import BadInput
from pilon_compress.models.block_call import hidden_of
from pilon_compress.models.blocks import blocks
from pilon_compress.models.forward import run_base
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import banks, projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.rescale import rescale_banks
from pilon_compress.nn.specs import BankSpec, ProjectionSpec
from pilon_compress.optimize.loop import RESTARTS

FEED_FORWARD = {
    "gpt2": ("h", {"up": "mlp.c_fc", "down": "mlp.c_proj"}),
    "llama": ("layers", {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}),
    "bert": ("encoder.layer", {"up": "intermediate.dense", "down": "output.dense"}),
}
STEPS = 40


def converted(dense, family, bands=((0, 1), (2,))):
    """A PILON model with small banks that shares all other tensors with `dense`, as conversion makes it."""
    model = copy.deepcopy(dense, memo={id(p): p for p in [*dense.parameters(), *dense.buffers()]})
    path, roles = FEED_FORWARD[family]
    specs, composed = {}, {}
    for number, band in enumerate(bands):
        for role, place in roles.items():
            shape = (64, 32) if role == "down" else (32, 64)
            specs[f"band{number}.{role}"] = BankSpec(*shape, n_primitives=3, rank=8)
            for layer in band:
                spec = ProjectionSpec(f"band{number}.{role}", 2, bias=family != "llama")
                composed[f"{path}.{layer}.{place}"] = spec
    install(model, Layout(specs, composed))
    initialise(model, 0.1, torch.Generator().manual_seed(0))
    return model.eval()


def text(count=6, padded=True):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        ids, mask = torch.randint(5, 200, (4, 12), generator=generator), torch.ones(4, 12, dtype=torch.long)
        if padded:
            mask[1, 7:] = 0
        batches.append(Batch(ids, mask))
    return batches


@pytest.fixture(params=FEED_FORWARD)
def pair(request, tiny):
    dense = tiny.tiny_model(request.param, "base" if request.param == "bert" else "lm")
    return converted(dense, request.param), dense


@pytest.fixture
def bert(tiny):
    dense = tiny.tiny_model("bert", "base")
    return converted(dense, "bert"), dense


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def changed(before, model):
    return {name for name, p in model.state_dict().items() if not torch.equal(before[name], p)}


def held_out_loss(model, dense, held):
    """The states' squared error on text, computed without the code under test."""
    total = 0.0
    for batch in held:
        states = []
        for one in (model, dense):
            with torch.no_grad():
                out = one.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            states.append(out.last_hidden_state[batch.attention_mask.bool()])
        total += float((states[0] - states[1]).square().mean())
    return total


def test_held_out_loss_falls_and_only_composed_parameters_move(pair):
    model, dense = pair
    held, before, teacher = text(2), weights(model), weights(dense)
    error = held_out_loss(model, dense, held)
    made = refine.refine(model, dense, text(), held, steps=STEPS, rate=0.02)
    assert made.kept and made.after < 0.9 * made.before
    assert held_out_loss(model, dense, held) < 0.95 * error
    moved = changed(before, model)
    allowed = {f"{name}.{leaf}" for name, _ in projections(model) for leaf in ("weight", "bias")}
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    assert moved and all(name.removeprefix(prefix) in allowed or "pilon_banks" in name for name in moved)
    assert not changed(teacher, dense)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_result_says_what_was_done(pair):
    made = refine.refine(*pair, text(), steps=STEPS, rate=0.01)
    assert made.steps == STEPS and made.rate == 0.01 and made.halvings == 0 and made.kept
    steps = [step for step, _ in made.history]
    assert steps[0] == 0 and steps[-1] == STEPS and len(steps) == 1 + -(-STEPS // -(-STEPS // refine.CHECKS))
    assert made.history[0] == (0, made.before) and min(loss for _, loss in made.history) == made.after < made.before


def test_banks_stay_shared(bert):
    model, dense = bert
    owned = {id(bank) for _, bank in banks(model)}
    refine.refine(model, dense, text(), steps=STEPS, rate=0.02)
    assert {id(p.bank) for _, p in projections(model)} == owned
    first, second = (p for name, p in projections(model) if name.endswith("intermediate.dense") and ".2." not in name)
    assert first.bank is second.bank


def test_same_seed_same_weights(tiny):
    results = []
    for seed in (3, 3, 4):
        dense = tiny.tiny_model("bert", "base")
        model = converted(dense, "bert")
        refine.refine(model, dense, text(), steps=20, seed=seed)
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_an_absurd_rate_leaves_the_model_bit_for_bit(bert):
    model, dense = bert
    before = weights(model)
    made = refine.refine(model, dense, text(), steps=12, rate=1e6)
    assert made.after <= made.before
    assert made.kept or not changed(before, model)
    assert made.halvings > 0 and made.rate < 1e6


def poison(model, when):
    """Fill the gradient of one bank with NaN at the backward passes that `when`, counted from 1, is true for."""
    calls, bank = [], next(bank for _, bank in banks(model))

    def spoil(gradient):
        calls.append(1)
        return torch.full_like(gradient, math.nan) if when(len(calls)) else gradient

    bank.A.requires_grad_(True)
    return bank.A.register_hook(spoil)


def test_nan_is_rolled_back_and_the_rate_halved(bert):
    model, dense = bert
    poison(model, lambda call: call == 8)
    made = refine.refine(model, dense, text(), steps=STEPS, rate=0.01)
    assert made.halvings == 1 and made.rate == 0.005
    assert made.kept and made.after < made.before
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_nothing_but_nan_leaves_the_model_bit_for_bit(bert):
    model, dense = bert
    poison(model, lambda call: True)
    before = weights(model)
    made = refine.refine(model, dense, text(), steps=STEPS, rate=0.01)
    assert not made.kept and made.halvings == RESTARTS and made.after == made.before and not changed(before, model)


def test_rescaling_keeps_the_function_and_evens_the_factors(pair):
    model, _ = pair
    batch = text(1)[0]
    for _, bank in banks(model):
        bank.A.data.mul_(30)
    with torch.no_grad():
        before = run_base(model, batch).last_hidden_state
        rescale_banks(model)
        torch.testing.assert_close(run_base(model, batch).last_hidden_state, before, rtol=1e-4, atol=1e-4)
    for _, bank in banks(model):
        torch.testing.assert_close(bank.A.norm(dim=1), bank.B.norm(dim=2))


def test_minutes_end_the_run(bert):
    made = refine.refine(*bert, text(), steps=10**6, minutes=0.02)
    assert 0 < made.steps < 10**6 and made.after <= made.before


def test_text_is_split_and_too_little_is_refused():
    batches = text(20)
    train, held = refine.split(batches)
    assert len(train) == 18 and len(held) == 2 and not any(a is b for a in train for b in held)
    (part,), (rest,) = refine.split(batches[:1])
    assert len(part.input_ids) == 3 and len(rest.input_ids) == 1
    with pytest.raises(BadInput, match="at least two"):
        refine.split([Batch(torch.ones(1, 4).long(), torch.ones(1, 4).long())])


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "mistral", "qwen3", "gemma", "opt", "gpt_neox", "bert", "distilbert"]
)
def test_a_stream_sees_what_the_model_computes(tiny, family):
    model, batches, seen = tiny.tiny_model(family), text(2), []
    stream = Stream(Source(model), batches)
    layers = list(blocks(model).values())
    for layer in layers:
        layer.register_forward_hook(lambda _module, _args, output: seen.append(hidden_of(output)))
    with torch.no_grad():
        for batch in batches:
            run_base(model, batch)
    other = stream.fork()
    for index, layer in enumerate(layers):
        stream.advance(layer)
        for number, hidden in enumerate(stream.hidden):
            assert torch.equal(hidden, seen[number * len(layers) + index])
    assert stream.position == len(layers) and other.position == 0


def test_states_that_put_tokens_first_are_turned(tiny):
    """XLNet, with as many rows as tokens, where shapes do not tell."""
    dense = tiny.other_model("xlnet").transformer
    ids = torch.randint(5, 200, (8, 8), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids))
    wanted = Teacher(dense, hidden=True).wanted(batch)
    stream = Stream(Source(dense), [batch])
    for block, states in zip(blocks(dense).values(), wanted["hidden"], strict=True):
        stream.advance(block)
        torch.testing.assert_close(states, stream.hidden[0])


def test_the_dense_model_runs_once_for_each_batch(bert, monkeypatch):
    model, dense = bert
    runs = []
    dense.register_forward_hook(lambda *_: runs.append(1))
    refine.refine(model, dense, text(), text(2), steps=STEPS)
    assert len(runs) == 6 + 2
    monkeypatch.setattr(refine, "CACHED", 0)
    runs.clear()
    refine.refine(model, dense, text(), text(2), steps=6)
    assert len(runs) > 6 + 2


def test_logits_that_do_not_fit_are_computed_in_parts(tiny, monkeypatch):
    """Micro batches change nothing but the order of sums."""
    results = []
    for room in (2**26, 2 * 12 * 256):
        monkeypatch.setattr("pilon_compress.nn.functional.LOGITS", room)
        dense = tiny.tiny_model("llama", "lm")
        model = converted(dense, "llama")
        results.append(refine.refine(model, dense, text(padded=False), steps=8))
    assert results[0].after == pytest.approx(results[1].after, rel=1e-4)
