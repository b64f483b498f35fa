"""Healing an encoder: its embeddings come nearer to the teacher's, whatever the padding beside them."""

import json

import pytest
import torch

from pilon_compress.config import conversion
from pilon_compress.config import training as recipes
from pilon_compress.convert.pipeline import convert
from pilon_compress.data.paragraph_dataset import SortedLoader, SpacedRows, tokenise_paragraphs
from pilon_compress.distill.students import EmbeddingStudent
from pilon_compress.distill.teacher import Teacher
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.evaluate import evaluate
from pilon_compress.models import checkpoint
from pilon_compress.train.pipeline import train_model

WORDS = [
    "stone",
    "river",
    "bright",
    "seven",
    "under",
    "letter",
    "garden",
    "cold",
    "window",
    "paper",
    "sings",
    "slowly",
    "above",
    "a",
    "green",
    "market",
]


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    texts = [" ".join(WORDS[(i * j + j // 3) % len(WORDS)] for j in range(1, 16 + i % 9)) for i in range(160)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tiny.save_tiny("bert", folder / "dense", "base")
    text = {"data": str(folder / "text.jsonl"), "samples": 48, "sequence_length": 64}
    asked = {"model": str(folder / "dense"), "budget": {"ffn_ratio": 0.2}, "calibration": text, "effort": "fast"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PILON_CACHE", str(folder / "cache"))
        convert(conversion.build({**asked, "evaluation": {"data": "none"}}), folder / "pilon")
        yield folder


def healing(folder, steps=25, **changes):
    data = {"source": str(folder / "text.jsonl"), "sequence_length": 64, "validation_sequences": 20}
    asked = {"task": "heal", "start": str(folder / "pilon"), "data": data, "run": {"batch_size": 8}}
    asked |= {"schedule": {"tokens": steps * 8 * 64}, "optimizer": {"learning_rate": 5e-4}}
    return recipes.build(asked, [f"{name}={json.dumps(value)}" for name, value in changes.items()])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distill.hidden": 0.0},
        {"run.micro_batch_size": 3, "distill.match_until": 0.5},
    ],
)
def test_embeddings_come_nearer_to_the_teachers(home, tmp_path, changes):
    result = train_model(healing(home, **changes), tmp_path / "out", quiet=True).dump()
    assert result["before"] < result["val_cosine"] <= 1 == result["teacher"]
    assert 0 <= result["neighbors10"] <= 1 and "val_perplexity" not in result
    healed, converted = (
        evaluate(str(folder), data=str(home / "text.jsonl")).dump() for folder in (tmp_path / "out", home / "pilon")
    )
    assert healed["kind"] == "encoder" and healed["cosine"] > converted["cosine"]


def test_a_resumed_run_ends_like_one_that_never_stopped(home, tmp_path):
    asked = healing(home, 12, **{"run.evaluate_every": 3, "run.keep": 5, "run.checkpoint_every": 1e-6})
    train_model(asked, tmp_path / "whole", quiet=True)
    train_model(asked, tmp_path / "parts", quiet=True)
    last = sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))
    for step in last[3:]:
        (step / "state.json").unlink()
    train_model(asked, tmp_path / "parts", resume=True, quiet=True)
    ours, theirs = (checkpoint.load_model(str(tmp_path / name)).state_dict() for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_padding_changes_nothing_and_texts_count_alike(home, tiny):
    rows = tokenise_paragraphs(str(home / "text.jsonl"), checkpoint.load_tokenizer(str(home / "dense")), "all", 64)
    teacher = Teacher(checkpoint.load_model(str(home / "dense")), hidden=True)
    student = checkpoint.load_model(str(home / "pilon"))
    sizes = rows.sizes.argsort()
    picked = [int(sizes[0]), int(sizes[-1])]
    batch = rows.batch(picked)
    assert batch.input_ids.shape[1] == rows.sizes[picked[1]] and batch.attention_mask[0].sum() == rows.sizes[picked[0]]
    trainee = EmbeddingStudent(student, teacher.variance(batch)).eval()
    terms = torch.ones(4)

    def loss(indices):
        one = rows.batch(indices)
        return trainee(one.inputs(), one.labels, teacher.wanted(one), terms).item()

    assert loss(picked) == pytest.approx(loss(picked[:1]) + loss(picked[1:]), rel=1e-4)
    quiet = batch.unscored()
    assert trainee(quiet.inputs(), quiet.labels, teacher.wanted(quiet), terms) == 0
    assert batch.scored == 2 and batch.tokens == rows.sizes[picked].sum() and quiet.tokens == 0


def test_micro_batches_hold_texts_of_like_length(home):
    rows = tokenise_paragraphs(str(home / "text.jsonl"), checkpoint.load_tokenizer(str(home / "dense")), "all", 64)
    loader = SortedLoader(rows, 12, 0, 3)
    sizes = [loader.batch(2, micro).attention_mask.sum(1) for micro in range(3)]
    assert torch.cat(sizes).tolist() == sorted(torch.cat(sizes).tolist(), reverse=True)
    assert sorted(loader.indices(2)) == sorted(super(SortedLoader, loader).indices(2))
    assert len(SpacedRows(rows, 7)) == 7 and len(SpacedRows(rows, 10_000)) == len(rows)


def test_an_encoders_teacher_is_not_cached_and_nothing_else_trains_encoders(home, tmp_path):
    with pytest.raises(BadInput, match="encoder"):
        train_model(healing(home, **{"distill.cache_teacher": 4}), tmp_path / "out", quiet=True)
    with pytest.raises(BadInput, match="distill.temperature has no effect with an encoder"):
        train_model(healing(home, **{"distill.temperature": 2.0}), tmp_path / "out", quiet=True)
    with pytest.raises(BadInput, match="can be healed"):
        train_model(healing(home, task="sft"), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
