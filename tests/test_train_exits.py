"""Training of exit gates: prices against true divergences, the regression, the threshold's promise, the whole road."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import pilon_compress as pc
from pilon_compress.cli.usage import with_values
from pilon_compress.config import training
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.evaluate import evaluate
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.provenance import lineage
from pilon_compress.nn.exits import gated_blocks
from pilon_compress.nn.specs import NEVER
from pilon_compress.train.exits import record
from pilon_compress.train.exits.places import gate_places, own_projections
from pilon_compress.train.exits.record import Recorder
from pilon_compress.train.exits.solve import Metric, fit_gate, solve, substitute
from pilon_compress.train.exits.threshold import Held, Measured, choose
from pilon_compress.train.preflight import plan

WORDS = ["the cat sat on the mat", "a dog ran after the ball", "rain fell on the old roof", "she read a book at noon"]
TEXTS = [f"{WORDS[i % 4]} and {WORDS[(i * 7 + 1) % 4]} number {i}. " * 3 for i in range(120)]


@pytest.fixture(scope="module")
def uneven(tiny):
    """A model that learned TEXTS by heart, with a middle block that hardly matters."""
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer()
    down = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        down.mul_(1e-2).requires_grad_(False)
    ids = torch.tensor(tokenizer("\n".join(TEXTS))["input_ids"])
    rows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3)
    for step in range(60):
        batch = rows[torch.randint(len(rows), (8,), generator=torch.Generator().manual_seed(step))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(True).eval()


def batch_of(rows=6, length=40, seed=0):
    ids = torch.randint(6, 200, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Batch(ids).labelled(causal=True)


def test_prices_are_the_divergence_of_the_final_predictions(tiny, monkeypatch):
    """½ E(g·δ)² against KL of two true runs, for small changes of one block's output at one token."""
    monkeypatch.setattr(record, "DRAWS", 400)
    model, name = tiny.tiny_model("llama").requires_grad_(False), "layers.1.mlp"
    ids = batch_of(1, 12).input_ids
    batch = Batch(ids, labels=ids.roll(-1, 1))
    recorder = Recorder(model, [name], TensorStore(), 0)
    recorder.record([batch])
    _, y, gradients = recorder.of(name)
    change = 0.02 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    estimated = 0.5 * (gradients * change).sum(-1).square().mean(0)
    with torch.no_grad():
        before = model(batch.input_ids).logits.double().log_softmax(-1)
        true = []
        for token in range(len(y)):
            moved = torch.zeros(1, len(y), y.shape[1])
            moved[0, token] = change[token]
            hook = model.base_model.get_submodule(name).register_forward_hook(
                lambda m, a, out, moved=moved: out + moved
            )
            after = model(batch.input_ids).logits.double().log_softmax(-1)
            hook.remove()
            true.append(float((before.exp() * (before - after)).sum()))
    ratio = estimated / torch.tensor(true)
    assert float(ratio.min()) > 0.7 and float(ratio.max()) < 1.4  # of 400 draws
    assert float(estimated.sum()) == pytest.approx(sum(true), rel=0.1)


def test_the_regression_finds_the_gate_that_drew_the_prices():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 8, generator=generator) * torch.linspace(0.2, 3, 8) + 1
    w = torch.tensor([1.0, -0.5, 0.3, 0.0, 0.2, -0.1, 0.0, 0.1])
    draws = torch.randn(20_000, generator=generator)
    prices = (x @ w - 2).exp() * draws.square()
    found, bias = fit_gate(x, prices)
    scores = x.double() @ found + bias
    assert torch.corrcoef(torch.stack([scores, (x @ w).double()]))[0, 1] > 0.99
    assert float((prices / scores.exp()).mean()) == pytest.approx(1, abs=0.05)


def test_the_substitute_of_a_linear_block_is_exact_and_a_constant_is_the_mean():
    generator = torch.Generator().manual_seed(0)
    x, left, right = (torch.randn(*shape, generator=generator) for shape in ((900, 12), (12, 3), (3, 12)))
    y = x @ left @ right + 2
    metric = Metric.of(torch.eye(12).double())
    exact = substitute(x, y, 3, metric)
    assert float((exact(x) - y).norm() / y.norm()) < 0.02  # the ridge
    torch.testing.assert_close(substitute(x, y, 0, metric)(x), y.mean(0).expand_as(y))
    cut = substitute(x, y, 1, metric)
    assert cut.down.shape == (12, 1) and float((cut(x) - y).norm()) > float((exact(x) - y).norm())


def test_a_gate_prefers_tokens_whose_block_does_little():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    small = x[:, 0] > 0
    y = torch.randn(4000, 8, generator=generator) * torch.where(small, 0.01, 1.0)[:, None]
    gradients = torch.randn(2, 4000, 8, generator=generator)
    found = solve(x, y, gradients, 0, 1.0)
    cheap = torch.zeros(4000, dtype=torch.bool).index_fill(0, found.scores.argsort()[:1000], True)
    assert float(small[cheap].float().mean()) > 0.97
    dear = solve(x, y, gradients, 0, 0.5)
    torch.testing.assert_close(dear.scores, found.scores + math.log(2), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_own_projections_change_no_output(tiny, family):
    model, dense = tiny.tiny_model(family), tiny.tiny_model(family)
    own_projections(model, gate_places(dense))
    ids = batch_of(2, 9).input_ids
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)


@pytest.mark.parametrize("family", ["bert", "opt"])
def test_blocks_without_a_module_of_their_own_are_refused_by_name(tiny, family):
    with pytest.raises(BadInput, match=r"has no exit gates: .*layer"):
        gate_places(tiny.tiny_model(family))


@pytest.fixture(scope="module")
def made(tiny, uneven):
    """Gates for the uneven model, by the library's call."""
    config = pc.ExitGatesConfig(max_perplexity_increase="2%", tokens=6000, sequence_length=64, substitute=4)
    return uneven, *pc.add_exit_gates(uneven, tiny.tiny_tokenizer(), config, TEXTS)


def test_gates_skip_the_block_that_hardly_matters_within_the_budget(made):
    dense, model, result = made
    exits = result.exits
    assert result.task == "gates" and len(list(gated_blocks(model))) == 3
    first, middle, last = exits.skipped_by_layer
    assert middle > 0.9 and max(first, last) < 0.7
    assert exits.skipped == pytest.approx(sum(exits.skipped_by_layer) / 3)
    assert exits.perplexity_increase <= 0.02 == exits.max_perplexity_increase
    assert result.val_perplexity == pytest.approx(exits.perplexity_without * (1 + exits.perplexity_increase))
    for name, parameter in dense.named_parameters():  # frozen, to the bit
        assert torch.equal(model.get_parameter(name), parameter)
    assert not list(gated_blocks(dense))


def test_the_plan_is_what_is_made(made, tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    fields = {"task": "gates", "start": str(tmp_path / "dense"), "exits": {"substitute": 4}}
    planned = plan(training.build(fields, ["data.sequence_length=64"]))
    assert planned.tokens == 2**15 and planned.ffn.stored_ratio > 1
    assert planned.ffn.stored == made[2].ffn.stored and planned.ffn.bytes == made[2].ffn.bytes


def test_an_evaluation_counts_what_is_skipped(made, tiny):
    dense, model, result = made
    found = pc.evaluate(model, data=TEXTS[:40], against=dense, config=pc.EvaluateConfig(window=64))
    assert found.skipped > 0.25 and found.skipped_by_layer[1] > 0.9
    assert found.perplexity_ratio < 1.1
    assert (
        pc.evaluate(dense, tiny.tiny_tokenizer(), data=TEXTS[:40], config=pc.EvaluateConfig(window=64)).skipped is None
    )


def test_a_budget_that_allows_nothing_leaves_gates_that_skip_nothing(tiny, said):
    config = pc.ExitGatesConfig(max_perplexity_increase=1e-9, tokens=2000, sequence_length=64, substitute=0)
    model, result = pc.add_exit_gates(tiny.tiny_model("llama"), tiny.tiny_tokenizer(), config, TEXTS)
    if not result.exits.skipped:  # a lucky token may lower the perplexity
        assert result.exits.threshold == NEVER and any("no token can skip" in line for line in said())
    assert result.exits.perplexity_increase <= 1e-9
    assert all(block.exit_gate.threshold == result.exits.threshold for _, block in gated_blocks(model))


class Curve:
    """Held-out text on which skipping costs `factor` times the price that gates promise."""

    def __init__(self, scores, factor):
        self.scores, self.factor, self.looks = scores, factor, 0
        self.model = SimpleNamespace(base_model=torch.nn.Module())

    def at(self, threshold):
        self.looks += 1
        below = self.scores <= threshold
        cost = self.factor * float((self.scores.exp() * below).sum()) / self.scores.shape[1]
        return Measured(threshold, math.expm1(cost), float(below.float().mean()), [])


@pytest.mark.parametrize("factor", [0.02, 0.5, 1.0, 6.0])
@pytest.mark.parametrize("allowed", [0.01, 0.05])
def test_the_threshold_uses_the_budget_and_keeps_it(factor, allowed):
    scores = 2 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0)) - 2
    held = Curve(scores, factor)
    best = choose(held, scores, allowed)
    assert 0.8 * allowed < best.increase <= allowed and held.looks <= 8


def test_the_command_ends_as_other_trainings_do(tiny, tmp_path, cli, uneven):
    uneven.save_pretrained(tmp_path / "dense")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    words = ["--data", "text.txt", "--sequence-length", 64, "--set", "exits.tokens=4000"]
    words += ["--max-perplexity-increase", "3%", "--json"]
    done = cli("train", "--exit-gates", "dense", "-o", "out", *words, cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["exits"]["skipped"] > 0.2 and told["exits"]["perplexity_increase"] <= 0.03
    assert {"config.json", "model.safetensors", "train.json", "train.html", "README.md", "manifest.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert not (tmp_path / "out" / "checkpoints" / "exits").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(list(gated_blocks(model))) == 3
    assert "at exit gates" in (tmp_path / "out" / "README.md").read_text()
    assert lineage(tmp_path / "out").dense == str(tmp_path / "dense") or lineage(tmp_path / "out").dense == "dense"
    evaluated = json.loads(cli("eval", "out", "--data", "text.txt", "--window", 64, "--json", cwd=tmp_path).stdout)
    assert evaluated["skipped"] > 0.2 and evaluated["perplexity_ratio"] < 1.1
    assert "skips" in cli("inspect", "out", cwd=tmp_path).stdout
    assert cli("generate", "out", "--prompt", "the cat", "--max-new-tokens", 4, cwd=tmp_path).stdout
    again = cli("train", "--exit-gates", "out", "-o", "two", *words, cwd=tmp_path)
    assert json.loads(again.stdout)["exits"]["skipped"] == pytest.approx(told["exits"]["skipped"], abs=0.05)
    timed = json.loads(cli("bench", "out", "--context", 32, "--rounds", 2, "--json", cwd=tmp_path).stdout)
    assert 0 < timed["skipped_work"] < 1


def test_a_training_from_scratch_ends_with_gates(tmp_path, cli):
    words = ["--set", "schedule.tokens=8192", "--set", "exits.tokens=2048", "--max-perplexity-increase", "5%"]
    done = cli("train", "--recipe", "smoke", "--exit-gates", "-o", "out", *words, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert told["task"] == "pretrain" and told["steps"] == 8 and told["exits"]["perplexity_increase"] <= 0.05
    assert len(list(gated_blocks(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))) == 4
    assert evaluate(str(tmp_path / "out"), data="stdlib:topics").skipped is not None


def test_the_option_may_come_without_a_model():
    assert with_values(["--exit-gates", "-o", "x"], {"--exit-gates"}) == ["--exit-gates", "", "-o", "x"]
    assert with_values(["-o", "x", "--exit-gates"], {"--exit-gates"}) == ["-o", "x", "--exit-gates", ""]
    assert with_values([], {"--exit-gates"}) == []
    assert with_values(["--exit-gates", "m", "-o", "x"], {"--exit-gates"}) == ["--exit-gates", "m", "-o", "x"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "gates"}, "is needed with task gates"),
        ({"task": "gates", "start": "m", "optimizer": {"learning_rate": 1e-4}}, "changes no weights"),
        ({"task": "gates", "start": "m", "ternary": {"enabled": True}}, "changes no weights"),
        ({"task": "pretrain", "exits": {"max_perplexity_increase": 0.02}}, "exits.enabled false"),
        ({"task": "heal", "start": "m", "shrink": [0.5], "exits": {"enabled": True}}, "add gates to its result"),
        ({"task": "gates", "start": "m", "exits": {"max_perplexity_increase": 0}}, "must be above 0"),
    ],
)
def test_fields_that_have_no_effect_are_refused(fields, words):
    with pytest.raises(BadInput, match=words):
        training.build(fields)


def test_models_that_cannot_have_gates_are_refused_before_anything_is_written(tiny, tmp_path):
    tiny.save_tiny("bert", tmp_path / "bert")
    tiny.save_tiny("opt", tmp_path / "opt")
    for name, words in (("bert", "predicts no next token"), ("opt", "has no exit gates")):
        with pytest.raises(BadInput, match=words):
            plan(training.build({"task": "gates", "start": str(tmp_path / name)}))


def test_held_out_text_is_run_once_without_skipping(uneven):
    dense = float(uneven(batch_of().input_ids, labels=batch_of().input_ids).loss)
    assert Held(uneven, [batch_of()]).perplexity == pytest.approx(math.exp(dense), rel=1e-4)
