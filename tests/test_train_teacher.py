"""Check that divergences equal a reference, and predictions from disk equal live ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pilon_compress.data.batch import Batch
from pilon_compress.data.block_dataset import BlockDataset
from pilon_compress.data.token_files import tokenise
from pilon_compress.distill import teacher_cache
from pilon_compress.distill.kl import divergences, largest
from pilon_compress.distill.students import CausalStudent
from pilon_compress.distill.teacher import Teacher
from pilon_compress.distill.teacher_cache import CacheRequest
from pilon_compress.parallel import World

ALONE = World(0, 1, torch.device("cpu"))
V, D, N = 40, 8, 30


@pytest.fixture
def rows():
    torch.manual_seed(0)
    head, theirs = nn.Linear(D, V, bias=False), nn.Linear(D, V)
    labels = torch.randint(V, (N,)).masked_fill(torch.arange(N) % 5 == 0, -100)
    hidden = torch.randn(N, D, requires_grad=True)
    soft_targets = {"states": 3 * torch.randn(N, D), "head": theirs.weight.detach(), "bias": theirs.bias.detach()}
    return head, hidden, labels, soft_targets


def reference(head, hidden, labels, soft_targets, temperature):
    """T² · KL, in float64, term by term."""
    ours = (hidden.double() @ head.weight.double().T / temperature).log_softmax(-1)
    theirs = soft_targets["states"].double() @ soft_targets["head"].double().T + soft_targets["bias"].double()
    theirs = (theirs / temperature).log_softmax(-1)
    each = (theirs.exp() * (theirs - ours)).sum(-1)
    return temperature**2 * each[labels != -100].sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("at_once", [2**26, 2 * V * 7])
def test_divergence_and_its_gradient_equal_a_reference_whole_and_in_parts(rows, monkeypatch, temperature, at_once):
    monkeypatch.setattr("pilon_compress.nn.functional.LOGITS", at_once)
    head, hidden, labels, soft_targets = rows
    found = divergences(head, hidden, labels, soft_targets, temperature, next_token=True)
    wanted = reference(head, hidden, labels, soft_targets, temperature)
    nats = nn.functional.cross_entropy(head(hidden), labels, ignore_index=-100, reduction="sum")
    assert found[0].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found[1].item() == pytest.approx(nats.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(one, [hidden, head.weight])[:2] for one in (found[0], wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_k_values_bound_the_divergence_from_below_and_all_of_them_give_it(rows, temperature):
    head, hidden, labels, soft_targets = rows
    logits = soft_targets["states"] @ soft_targets["head"].T + soft_targets["bias"]
    exact = divergences(head, hidden, labels, soft_targets, temperature, False)[0].item()
    found = []
    for k in (1, 4, 16, V):
        values, tokens, rest = largest(logits, k, temperature)
        kept = {"values": values, "tokens": tokens, "rest": rest}
        total = divergences(head, hidden, labels, kept, temperature, False)[0]
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, [hidden, head.weight]))
        found.append(float(total))
    assert found == sorted(found), "more tokens tell more"
    assert found[-1] == pytest.approx(exact, rel=1e-5)


def test_a_student_that_predicts_the_same_is_not_apart(rows):
    _, _, labels, soft_targets = rows
    head = nn.Linear(D, V)
    head.weight.data, head.bias.data = soft_targets["head"].clone(), soft_targets["bias"].clone()
    logits = soft_targets["states"] @ soft_targets["head"].T + soft_targets["bias"]
    kept = dict(zip(("values", "tokens", "rest"), largest(logits, 8, 1.0), strict=True))
    for one in (soft_targets, kept):
        assert abs(float(divergences(head, soft_targets["states"], labels, one, 1.0, False)[0])) < 1e-4


@pytest.fixture
def asked(tiny, tmp_path):
    texts = [f"{i}: the {i * i} of {i + 7} is " + "xyz"[i % 3] * (i % 11) for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    blocks = BlockDataset(tokenise(str(tmp_path / "t.jsonl"), tiny.tiny_tokenizer(), "all", tmp_path / "tokens"), 16)
    teacher = Teacher(tiny.tiny_model("llama"))
    return teacher, CacheRequest(blocks, np.arange(len(blocks)), 16, 8, tiny.VOCAB, 1.0, "this teacher, that text")


def test_predictions_from_disk_are_what_the_teacher_says(asked, tmp_path):
    teacher, request = asked
    taught = teacher_cache.predictions(request, lambda: teacher, ALONE, 5, tmp_path / "cache")
    picked = [3, 0, 17, 3]
    batch = taught.batch(picked)
    plain = request.dataset.batch(picked)
    assert torch.equal(batch.input_ids, plain.input_ids) and len(taught) == len(request.dataset)
    values, tokens, rest = teacher.largest(plain, 8, 1.0)
    assert torch.equal(batch.soft_targets["tokens"], tokens)
    assert torch.allclose(batch.soft_targets["values"].float(), values, atol=4e-3)
    assert torch.allclose(batch.soft_targets["rest"].float(), rest, atol=4e-3)
    assert torch.allclose(values.exp().sum(-1) + rest.exp(), torch.ones(4, 16), atol=1e-5)


def test_a_teacher_runs_once_and_another_wish_is_another_folder(asked, tmp_path):
    teacher, request = asked
    home = tmp_path / "cache"
    teacher_cache.predictions(request, lambda: teacher, ALONE, 5, home)

    def never():
        raise AssertionError("asked again")

    again = teacher_cache.predictions(request, never, ALONE, 5, home)
    for change in ({"count": 4}, {"temperature": 2.0}, {"made_from": "another"}, {"indices": request.indices[::2]}):
        other = replace(request, **change)
        assert teacher_cache.predictions(other, lambda: teacher, ALONE, 5, home).folder != again.folder
    with pytest.raises(IndexError):
        other = teacher_cache.predictions(replace(request, indices=request.indices[::2]), never, ALONE, 5, home)
        other.batch([1])


def test_what_was_cut_short_is_made_again(asked, tmp_path):
    teacher, request = asked
    home = tmp_path / "cache"
    folder = teacher_cache.predictions(request, lambda: teacher, ALONE, 5, home).folder
    whole = (folder / "values.bin").read_bytes()
    (folder / "values.bin").write_bytes(whole[:-2])
    teacher_cache.predictions(request, lambda: teacher, ALONE, 7, home)
    assert (folder / "values.bin").read_bytes() == whole

    def fails(batch, count, temperature):
        raise KeyboardInterrupt

    (folder / "about.json").unlink()
    broken = Teacher(teacher.model)
    broken.largest = fails
    with pytest.raises(KeyboardInterrupt):
        teacher_cache.predictions(request, lambda: broken, ALONE, 5, home)
    assert not (folder / "about.json").exists(), "half a cache is none"
    teacher_cache.predictions(request, lambda: teacher, ALONE, 5, home)
    assert (folder / "values.bin").read_bytes() == whole


def test_the_shares_of_several_processes_are_the_whole(asked, tmp_path):
    teacher, request = asked
    folder = teacher_cache.predictions(request, lambda: teacher, ALONE, 5, tmp_path / "one").folder
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in request.files:
        (parts / f"{name}.bin").touch()
    for rank in (2, 0, 1):
        teacher_cache._write(parts, request, teacher, World(rank, 3, torch.device("cpu")), 4)
    for name in ("values", "tokens", "rest"):
        assert (parts / f"{name}.bin").read_bytes() == (folder / f"{name}.bin").read_bytes()


def test_terms_whose_weights_change_are_compiled_once(tiny):
    dense = tiny.tiny_model("llama")
    dense.config.architectures = ["LlamaForCausalLM"]
    teacher, student = Teacher(dense, hidden=True), tiny.tiny_model("llama", seed=1)
    student.config.use_cache = False

    def batch(seed):
        ids = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(seed))
        return Batch(ids, labels=ids.roll(-1, 1))

    trainee = CausalStudent(student, 1.0, True, teacher.variance(batch(0))).eval()
    compiled = torch.compile(trainee, dynamic=False, backend="eager")
    graphs = []
    for step in range(3):
        one, terms = batch(step), torch.tensor([1.0, 0.5, 1 - 0.3 * step, 0.0])
        wanted = teacher.wanted(one)
        found = compiled(one.inputs(), one.labels, wanted, terms)
        assert found.item() == pytest.approx(trainee(one.inputs(), one.labels, wanted, terms).item(), rel=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0
