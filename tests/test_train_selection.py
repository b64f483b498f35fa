"""Selections that explore: what takes part, what learns, what stays as it is, and what is left in the end."""

import pytest
import torch

from pilon_compress.config import training
from pilon_compress.errors import BadInput
from pilon_compress.models import base_architectures
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.installed import banks, layout_of, projections
from pilon_compress.optimize.optimizers import group_parameters, make_optimizers
from pilon_compress.research.original.moving_linear import settle, staged
from pilon_compress.research.original.selection import SelectionSchedule, stage
from pilon_compress.train.finish import plain_state
from pilon_compress.train.freeze_unused import FreezeUnused
from pilon_compress.train.preflight import layout_asked

STEPS = 20
IDS = torch.arange(24).reshape(2, 12) % 40
SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
FFN = {"rank": 2, "n_primitives": 8, "top_k": 3, "bands": 2, "ffn_ratio": 1, "mac_ratio": 1}


def asked(explore="none", ffn=None, **sections):
    data = {"task": "pretrain", "host": SHAPE, "ffn": {**FFN, **(ffn or {})}}
    research = {"original": {} if explore == "none" else {"selection": {"explore": explore, "until": 0.5}}}
    return training.build({**data, "research": research, **sections})


def built(settings):
    """The model as the pipeline would build it, and the callback that chooses."""
    config = base_architectures.config_for(settings.host, 32, 0)
    model = base_architectures.build_with(config, layout_asked(settings, config), settings.seed)
    stage(model, settings.research.sections["original"], settings.seed)
    return model, choosing_for(model, settings)


def choosing_for(model, settings):
    return SelectionSchedule(model, settings.research.sections["original"], settings.seed, STEPS)


def layers_of(model):
    return [layer for _, layer in staged(model)]


def loss_of(model):
    return model(IDS, labels=IDS).loss


def learn(model, settings, steps=range(STEPS), callbacks=()):
    """Train as the loop does, step by step; yields after each backward pass."""
    optimizers = make_optimizers(model, settings.optimizer)
    for step in steps:
        for callback in callbacks:
            callback.before(step, step / STEPS)
        loss_of(model).backward()
        yield step
        with FreezeUnused(model).around():
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("composition", ["component", "scalar"])
@pytest.mark.parametrize("explore", ["anneal", "noise", "gumbel"])
def test_a_settled_model_computes_what_the_exploring_one_did_with_its_last_choice(explore, composition):
    settings = asked(explore, {"composition": composition})
    model, choosing = built(settings)
    for _ in learn(model, settings, range(4, 14, 2), [choosing]):
        pass
    assert all(int((layer.mask > 0).sum()) == 3 for layer in layers_of(model))
    with torch.no_grad():
        before = model(IDS).logits
        for _, layer in staged(model):
            layer.settle()
        state = plain_state(model, model.state_dict())
        settle(model)
        assert torch.allclose(model(IDS).logits, before, atol=1e-5)
    assert not layers_of(model) and layout_of(model).projections
    for name, layer in projections(model):
        assert type(layer) is ComposedLinear and layer.weight.shape[0] == 3
        assert torch.equal(layer.selected, layer.selected.sort().values), name
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_annealing_goes_from_all_primitives_to_k_and_keeps_those_that_contribute_most():
    model, choosing = built(asked("anneal"))
    counts = []
    for step in range(STEPS):
        for layer in layers_of(model):
            layer.mask.zero_()
        choosing.before(step, step / STEPS)
        counts.append(int((layers_of(model)[0].mask > 0).sum()) if step <= choosing.final else 3)
    assert counts[0] == 8 and counts[10] == 3
    assert all(a >= b for a, b in zip(counts, counts[1:], strict=False)) and len(set(counts)) == 6
    layer = layers_of(model)[0]
    with torch.no_grad():
        layer.weight[5] *= 100
        layer.weight[2] *= 0.01
    choosing.before(8, 0.4)
    assert layer.used()[5] and not layer.used()[2]
    assert torch.equal(layer.contributions().argmax(), torch.tensor(5))


def test_the_output_keeps_its_variance_while_more_than_k_take_part():
    settings = asked("anneal", {"n_primitives": 64, "top_k": 8, "rank": 1}, host={**SHAPE, "hidden_size": 64})
    model, choosing = built(settings)
    layer = layers_of(model)[0]
    x = torch.randn(512, layer.bank.d_in, generator=torch.Generator().manual_seed(0))
    spread = []
    for step in (0, 5, 10):
        choosing.before(step, step / STEPS)
        spread.append(float(layer(x).detach().std()))
    assert max(spread) < 1.5 * min(spread)


@pytest.mark.parametrize("explore", ["noise", "gumbel"])
def test_disturbed_scores_change_the_selection_until_the_choice_is_final(explore):
    model, choosing = built(asked(explore))
    layer, seen = layers_of(model)[0], []
    for step in range(STEPS):
        choosing.before(step, step / STEPS)
        seen.append(frozenset(layer.selected[layer.mask > 0].tolist()))
        assert len(seen[-1]) == 3
    assert len(set(seen[:9])) > 3
    assert len(set(seen[10:])) == 1
    assert len(set().union(*seen[:9])) >= 7, "nearly every primitive has its turn"


def test_a_choice_depends_on_seed_and_step_alone():
    settings = asked("gumbel")
    (one, first), (other, second) = built(settings), built(settings)
    for step in range(7):
        first.before(step, step / STEPS)
    second.before(6, 6 / STEPS)
    chosen = [[layer.selected[layer.mask > 0].tolist() for layer in layers_of(model)] for model in (one, other)]
    assert chosen[0] == chosen[1]
    assert len({tuple(places) for places in chosen[0]}) > 1, "layers draw their own"
    third = choosing_for(other, asked("gumbel", seed=1))
    third.before(6, 6 / STEPS)
    assert [layer.selected[layer.mask > 0].tolist() for layer in layers_of(other)] != chosen[0]


@pytest.mark.parametrize("explore", ["noise", "gumbel"])
def test_gates_of_unselected_primitives_learn_too_and_stop_when_the_choice_is_final(explore):
    model, choosing = built(asked(explore))
    choosing.before(3, 3 / STEPS)
    loss_of(model).backward()
    layer = layers_of(model)[0]
    out = ~layer.used()
    assert (layer.gate.grad[out] != 0).all()
    assert (layer.weight.grad[out] == 0).all() and (layer.weight.grad[~out] != 0).all()
    model.zero_grad()
    choosing.before(12, 12 / STEPS)
    loss_of(model).backward()
    assert (layer.gate.grad == 0).all()


def test_a_gate_learns_what_a_change_of_its_primitives_mask_would_do():
    model, choosing = built(asked("noise"))
    choosing.before(0, 0.0)
    layer = layers_of(model.double())[0]
    generator = torch.Generator().manual_seed(0)
    x, wanted = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (16, 32))
    (layer(x) * wanted).sum().backward()
    changes = torch.zeros(8, dtype=torch.float64)
    with torch.no_grad():
        before = (layer(x) * wanted).sum()
        for place, primitive in enumerate(layer.selected.tolist()):
            layer.mask[place] += 1
            changes[primitive] = (layer(x) * wanted).sum() - before
            layer.mask[place] -= 1
        soft = layer.gate.softmax(0)
        assert torch.allclose(layer.gate.grad, 3 * soft * (changes - (changes * soft).sum()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("explore", "composition"), [("noise", "component"), ("anneal", "scalar"), ("none", "softmax")]
)
def test_what_no_layer_used_keeps_its_bits_through_the_optimiser(optimizer, explore, composition):
    # two layers a bank, one primitive each: most of a bank is unused
    ffn = {"composition": composition, "top_k": 1, "n_primitives": 8}
    settings = asked(explore, ffn, optimizer={"name": optimizer, "weight_decay": 0.5, "learning_rate": 0.05})
    model, choosing = built(settings)
    still = moved = 0
    watched = []
    for _ in learn(model, settings, range(6, 14), [choosing]):
        if watched:
            for bank, before, used in watched:
                for after, old in zip((bank.A, bank.B), before, strict=True):
                    same = torch.tensor([torch.equal(a, b) for a, b in zip(after, old, strict=True)])
                    assert torch.equal(same, ~used)
                    still, moved = still + int(same.sum()), moved + int((~same).sum())
        watched = []
        for _, bank in banks(model):
            users = [layer.used() for _, layer in projections(model) if layer.bank is bank]
            watched.append((bank, [bank.A.detach().clone(), bank.B.detach().clone()], torch.stack(users).any(0)))
    assert still and moved


def test_without_the_mask_decay_and_momentum_would_move_them():
    settings = asked("none", {"composition": "softmax", "top_k": 1}, optimizer={"weight_decay": 0.5})
    model, _ = built(settings)
    bank = next(bank for _, bank in banks(model))
    before = bank.A.detach().clone()
    loss_of(model).backward()
    make_optimizers(model, settings.optimizer)[0].step()
    assert (before != bank.A).all(dim=(1, 2)).all()


def test_gates_and_weights_are_compositions_and_start_with_unit_signs():
    model, _ = built(asked("gumbel"))
    names = group_parameters(model)["compositions"]
    assert sum(name.endswith(".gate") for name in names) == 8
    for layer in layers_of(model):
        assert layer.weight.shape == (8, 2) and (layer.weight.abs() == 1).all()


@pytest.mark.parametrize("explore", ["anneal", "gumbel"])
def test_one_graph_while_exploring_and_one_after(explore):
    """No choice compiles anything; the end of exploring does, once, since unselected primitives are left out then."""
    torch._dynamo.reset()
    settings = asked(explore, {"bands": 1}, host={**SHAPE, "num_hidden_layers": 2})
    model, choosing = built(settings)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model.base_model, backend=backend, dynamic=False)
    found = []
    for step in range(0, STEPS, 2):
        choosing.before(step, step / STEPS)
        run(IDS).last_hidden_state.sum().backward()
        found.append(len(graphs))
    assert len(set(found[:5])) == 1 and len(set(found[5:])) == 1
    assert found[-1] <= 2 * found[0]
    with torch.no_grad():
        assert torch.allclose(run(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state, atol=1e-6)


@pytest.mark.parametrize(
    ("original", "ffn", "part"),
    [
        ({"selection": {"explore": "noise"}}, {"composition": "softmax"}, "softmax"),
        ({"staged": {"phases": [1.0], "top_k": [3]}}, {}, "selection.explore"),
        ({"staged": {"phases": [0.5, 1.0], "rank": [1, 1]}}, {}, "staged.rank ends at 1"),
    ],
)
def test_choices_that_cannot_be_are_refused(original, ffn, part):
    data = {"task": "pretrain", "host": SHAPE, "ffn": {**FFN, **ffn}, "research": {"original": original}}
    with pytest.raises(BadInput, match=part):
        built(training.build(data))


def test_exploring_is_for_models_from_scratch():
    with pytest.raises(BadInput, match="from scratch"):
        training.build({"task": "heal", "start": "x", "research": {"original": {"selection": {"explore": "noise"}}}})
