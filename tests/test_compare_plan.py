"""What a comparison plans: which rows and cells there are, when cells are reused, and what is refused."""

import pytest
import torch

from pilon_compress.compare import run as comparing
from pilon_compress.compare.candidate import install, problem_of
from pilon_compress.config import conversion
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.families import find_sites
from pilon_compress.report.methods import method_of

PROSE = "\n\n".join(f"Paragraph {i} says that number {i * i % 97} is no more than a number." for i in range(120))


@pytest.fixture
def inside(tiny, tmp_path, monkeypatch):
    """The working folder holds a tiny GPT-2 `causal` and `text.txt`."""
    folder = tmp_path / "place"
    tiny.save_tiny("gpt2", folder / "causal")
    (folder / "text.txt").write_text(PROSE)
    monkeypatch.chdir(folder)


def settings(**calibration):
    asked = {"data": "text.txt", "samples": 4, "sequence_length": 64, **calibration}
    return conversion.build({"model": "causal", "calibration": asked, "evaluation": {"samples": 2}})


@pytest.mark.parametrize(
    ("ratios", "methods", "seeds", "message"),
    [
        ([1.5], ["svd"], 1, "at most 1"),
        ([0.0], ["svd"], 1, "above 0"),
        ([float("nan")], ["svd"], 1, "nan"),
        ([0.5], ["svd", ""], 1, "no method ''"),
        ([0.5], ["svd"], 0, "at least one"),
        ([0.01], ["pilon", "svd"], 1, "0.01 is too small"),
    ],
)
def test_what_cannot_be_compared_is_refused(inside, ratios, methods, seeds, message):
    with pytest.raises(BadInput, match=message):
        comparing.plan(settings(), ratios, methods, seeds)


def test_a_comparison_needs_text_to_judge_by(inside, tmp_path):
    asked = settings().model_copy(update={"evaluation": conversion.Evaluation(data="none")})
    with pytest.raises(BadInput, match="needs text to judge by"):
        comparing.compare(comparing.plan(asked, [0.5], ["svd"], 1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_cells_are_reused_only_for_the_same_model_text_and_settings(inside):
    def fingerprint(ratio=0.5, text=PROSE, change=0.0, **calibration):
        job = comparing.plan(settings(**calibration), [ratio], ["svd"], 1).base
        dense = checkpoint.load_model("causal", dtype="float32")
        with torch.no_grad():
            dense.transformer.h[1].mlp.c_fc.bias[0] += change
        return comparing.Evaluator(job, dense, checkpoint.load_tokenizer("causal"), [text]).fingerprint()

    first = fingerprint()
    assert fingerprint(ratio=0.4) == first, "a ratio may be added to a comparison that was interrupted"
    others = [fingerprint(text=PROSE[:-1]), fingerprint(change=1e-3), fingerprint(samples=5)]
    assert len({first, *others}) == 4


def test_our_own_rows_differ_by_what_their_recipes_say(inside):
    names = ["pilon", "pilon-bands", "pilon-neurons", "pilon-low-rank", "pilon-refined"]
    jobs = comparing.plan(settings(), [0.5], names, 1).jobs
    plain, shared, neurons, low_rank, refined = (jobs[name, 0.5] for name in names)
    assert shared.share == "always" and plain.share == "none"
    assert neurons.share == "always" and neurons.recipe.budget.primitive == "neurons"
    assert plain.recipe.budget.neurons and not low_rank.recipe.budget.neurons
    assert refined.recipe.refine.steps > 0 == plain.recipe.refine.steps
    assert all(job.allocated and job.recipe.budget.stored_limit == 0.5 for job in jobs.values())


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_a_baseline_is_installed_into_a_copy(tiny, family):
    dense = tiny.tiny_model(family)
    ids = torch.arange(40)[None] + 5
    before = dense(input_ids=ids).logits
    problem = problem_of(dense, find_sites(dense), {})
    assert torch.equal(install(dense, problem.weights, problem.biases)(input_ids=ids).logits, before)
    changed = install(dense, {name: weight / 2 for name, weight in problem.weights.items()}, problem.biases)
    assert not torch.allclose(changed(input_ids=ids).logits, before)
    assert torch.equal(dense(input_ids=ids).logits, before)


def test_every_method_is_explained_and_drawn_apart():
    methods = [method_of(name) for name in comparing.every_method()]
    curves = {method.curve.name: method.curve for method in methods}
    assert all(curve.about for curve in curves.values())
    assert len({method.title for method in methods}) == len(methods)
    assert len({curve.style.colour for curve in curves.values()}) == len(curves)
    assert len({(curve.style.marker, curve.style.line) for curve in curves.values()}) == len(curves)


def test_the_list_of_methods_says_what_each_is_compared_at(cli):
    lines = cli("compare", "--list").stdout.splitlines()
    said = {line.split()[0]: line for line in lines if line and line[0].isalpha()}
    assert said.keys() >= {*comparing.every_method()}
    assert "equal numbers" in said["nystrom"] and "Lin et al., 2025" in " ".join(lines)
    assert "equal bytes" in said["gptq-int3"] and "equal bytes" in said["pilon-int4"]
    assert "gptq-int3" not in comparing.default_methods() and "pilon-int4" not in comparing.default_methods()
