"""Healing: what conversion lost comes back, it is never worse than before, and stopping changes nothing."""

import json
import math
import pydoc_data.topics

import pytest
import torch

from pilon_compress.config import conversion
from pilon_compress.config import training as recipes
from pilon_compress.convert.pipeline import convert
from pilon_compress.distill.recovery import Recovery
from pilon_compress.distill.students import mismatch
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.evaluate import evaluate
from pilon_compress.export.run import export
from pilon_compress.models import checkpoint
from pilon_compress.models.provenance import lineage
from pilon_compress.optimize.monitor import read_metrics
from pilon_compress.train.pipeline import plan, train_model

NOTHING = torch.full((4,), math.nan)  # weights of the terms
LENGTH = 64


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text, a small dense LM that was trained on it, and its conversion to a fifth."""
    folder = tmp_path_factory.mktemp("heal")
    topics = [topic for _, topic in sorted(pydoc_data.topics.topics.items())][:30]
    lines = [json.dumps({"text": part}) for topic in topics for part in topic.split("\n\n") if len(part) > 60]
    (folder / "text.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PILON_CACHE", str(folder / "cache"))
        made = pretraining(folder, {"ffn": {"kind": "dense"}, "optimizer": {"learning_rate": 5e-3}})
        train_model(made, folder / "dense", quiet=True)
        convert(small_conversion(folder, 0.2), folder / "pilon")
        yield folder


def pretraining(folder, changes):
    host = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    host |= {"intermediate_size": 96, "vocab_size": 300, "tokenizer": "bpe"}
    data = {"source": str(folder / "text.jsonl"), "sequence_length": LENGTH, "validation_sequences": 12}
    run = {"batch_size": 8, "evaluate_every": 1000}
    return recipes.build(
        {"task": "pretrain", "host": host, "data": data, "schedule": {"tokens": 512 * 250}, "run": run, **changes}
    )


def small_conversion(folder, ratio):
    text = {"data": str(folder / "text.jsonl"), "samples": 24, "sequence_length": LENGTH, "batch_size": 8}
    asked = {"model": str(folder / "dense"), "budget": {"ffn_ratio": ratio}, "calibration": text}
    return conversion.build({**asked, "effort": "fast", "evaluation": {"data": "none"}})


def healing(folder, steps=40, **changes):
    data = {"source": str(folder / "text.jsonl"), "sequence_length": LENGTH, "validation_sequences": 12}
    asked = {"task": "heal", "start": str(folder / "pilon"), "data": data, "run": {"batch_size": 8}}
    asked |= {"schedule": {"tokens": steps * 8 * LENGTH}, "optimizer": {"learning_rate": 1e-2}}
    return recipes.build(asked, [f"{name}={json.dumps(value)}" for name, value in changes.items()])


def weights(folder):
    return checkpoint.load_model(str(folder)).state_dict()


def test_healing_brings_back_most_of_what_conversion_lost(home, tmp_path):
    result = train_model(healing(home), tmp_path / "out", quiet=True).dump()
    assert result["teacher"] < result["val_perplexity"] < result["before"]
    lost, left = result["before"] / result["teacher"], result["perplexity_ratio"]
    assert left - 1 < 0.7 * (lost - 1), (lost, left)
    assert result["ffn"]["stored_ratio"] < 0.21 and result["tokens"] > 0 and result["tokens_per_second"] > 0
    assert result["teacher_model"] == str(home / "dense"), "the folder tells where it was converted from"
    judged = evaluate(str(tmp_path / "out"), data=str(home / "text.jsonl")).dump()
    assert judged["against"] == str(home / "dense") and "held-out" in judged["data"]
    assert judged["perplexity_ratio"] < lost
    export(str(tmp_path / "out"), tmp_path / "exported", "dense")


@pytest.mark.parametrize(
    "changes",
    [
        {"distill.kl": 0.0, "distill.next_token": 1.0},
        {"distill.hidden": 0.2, "distill.match_until": 0.5},
        {"distill.kl": 0.0, "distill.hidden": 1.0},
        {"distill.temperature": 2.0},
        {"run.train": "ffn", "run.micro_batch_size": 3},
    ],
)
def test_each_term_alone_heals(home, tmp_path, changes):
    result = train_model(healing(home, 20, **changes), tmp_path / "out", quiet=True).dump()
    assert result["val_perplexity"] < result["before"] * 0.995


def test_the_best_weights_are_kept_and_are_never_worse_than_the_first(home, tmp_path):
    ruinous = {"optimizer.learning_rate": 3.0, "run.evaluate_every": 2, "run.spike": None}
    result = train_model(healing(home, 6, **ruinous), tmp_path / "out", quiet=True).dump()
    assert result["val_perplexity"] <= result["before"]
    ours, before = weights(tmp_path / "out"), weights(home / "pilon")
    assert all(torch.equal(ours[name], before[name]) for name in before), "nothing was better than the start"
    last = train_model(
        healing(home, 6, **ruinous, **{"distill.keep_best": False}), tmp_path / "last", quiet=True
    ).dump()
    assert last["val_perplexity"] > last["before"]


@pytest.mark.parametrize("changes", [{}, {"distill.cache_teacher": 16, "distill.temperature": 2.0}])
def test_stopped_and_resumed_is_the_same_as_never_stopped(home, tmp_path, stop_after, changes):
    asked = healing(home, 12, **changes, **{"run.evaluate_every": 4})
    whole = train_model(asked, tmp_path / "whole", quiet=True).dump()
    with stop_after(5):
        train_model(asked, tmp_path / "parts", quiet=True)
    assert not (tmp_path / "parts" / "config.json").exists()
    parts = train_model(asked, tmp_path / "parts", resume=True, quiet=True).dump()
    assert parts["before"] == whole["before"] and parts["val_perplexity"] == whole["val_perplexity"]
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_loss_that_is_nan_goes_back_to_the_best_weights_and_resumes_as_ever(home, tmp_path, stop_after, monkeypatch):
    """At step 7 of 12: what was learnt by the evaluation at step 4 stays, before and after a kill alike."""
    plain = Recovery.prepared

    def prepared(self, batch):
        inputs, labels, wanted, terms = plain(self, batch)
        return inputs, labels, wanted, terms * (math.nan if self.share == 6 / 12 else 1)

    monkeypatch.setattr(Recovery, "prepared", prepared)
    asked = healing(home, 12, **{"run.evaluate_every": 4})
    whole = train_model(asked, tmp_path / "whole", quiet=True)
    assert whole.val_perplexity < whole.before
    for stopped in (5, 9):
        out = tmp_path / f"parts{stopped}"
        with stop_after(stopped):
            train_model(asked, out, quiet=True)
        assert train_model(asked, out, resume=True, quiet=True).val_perplexity == whole.val_perplexity
        ours, theirs = weights(out), weights(tmp_path / "whole")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    rates = [line["rate"] for line in read_metrics(tmp_path / "whole") if "rate" in line]
    assert rates[-1] < 0.5 and all(math.isfinite(rate) for rate in rates)


def test_without_the_best_weights_a_loss_that_is_nan_ends_the_run(home, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Recovery, "prepared", lambda self, batch: (batch.inputs(), batch.labels, self.teacher.wanted(batch), NOTHING)
    )
    with pytest.raises(BadInput, match="the loss is nan at step 1: lower optimizer.learning_rate; there is no check"):
        train_model(healing(home, 5, **{"distill.keep_best": False}), tmp_path / "out", quiet=True)
    with pytest.raises(BadInput, match="the loss is nan at step 4: .*, after 3 restarts from the best weights; there"):
        train_model(healing(home, 5), tmp_path / "out", overwrite=True, quiet=True)


def test_the_mismatch_of_states_is_a_mean_over_layers_and_a_sum_over_tokens():
    ours, theirs = [torch.zeros(2, 3, 4)] * 2, [torch.ones(2, 3, 4), 2 * torch.ones(2, 3, 4)]
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    found = mismatch(ours, theirs, torch.tensor([1.0, 2.0]), weights)
    assert float(found) == pytest.approx(3 * (1 / 1 + 4 / 2) / 2)


def test_the_same_layout_from_scratch_is_a_control(home, tmp_path):
    asked = pretraining(home, {"ffn": {"like": str(home / "pilon")}, "schedule": {"tokens": 512 * 20}})
    planned = plan(asked).dump()
    result = train_model(asked, tmp_path / "control", quiet=True).dump()
    theirs = checkpoint.load_config(str(home / "pilon"))
    ours = checkpoint.load_config(str(tmp_path / "control"))
    assert ours.quantization_config["layout"] == theirs.quantization_config["layout"]
    assert result["ffn"]["stored_ratio"] == planned["ffn"]["stored_ratio"] < 0.21
    assert ours.vocab_size == theirs.vocab_size and ours.hidden_size == theirs.hidden_size
    healed = train_model(healing(home, 20), tmp_path / "healed", quiet=True).dump()
    assert result["val_perplexity"] > healed["val_perplexity"]


def test_where_a_model_comes_from_is_found_from_its_own_folder(home, tmp_path, monkeypatch):
    (tmp_path / "dense").symlink_to(home / "dense")
    (tmp_path / "pilon").mkdir()
    (tmp_path / "pilon" / "recipe.yaml").write_text("model: ../dense\ncalibration: {data: stdlib}\n")
    (tmp_path / "healed").mkdir()
    (tmp_path / "healed" / "recipe.yaml").write_text("task: heal\nstart: ../pilon\ndata: {source: a.txt}\n")
    found = lineage(tmp_path / "healed")
    assert found.dense is not None and checkpoint.load_config(found.dense).model_type == "llama"
    assert set(found.texts) == {"a.txt", "stdlib"}
    (tmp_path / "pilon" / "recipe.yaml").unlink()
    (tmp_path / "pilon" / "report.json").write_text('{"source": "out/dense"}')
    assert lineage(tmp_path / "healed").dense == "out/dense", "from the folder that the user is in"
    assert lineage(home / "cache").dense is None


def test_mistakes_are_told_in_one_line(home, tmp_path):
    def refused(match, **changes):
        with pytest.raises(BadInput, match=match) as caught:
            train_model(healing(home, 5, **changes), tmp_path / "never", quiet=True)
        assert "\n" not in str(caught.value) and not (tmp_path / "never").exists()

    refused("takes 64 tokens", **{"data.sequence_length": 128})
    refused("--teacher", start=str(home / "dense"))
    refused("there is no folder", teacher="./nowhere")
    refused("predictions only", **{"distill.cache_teacher": 8, "distill.hidden": 0.1})
    refused("must fall", shrink=[0.2, 0.4])
    refused("stored", **{"distill.cache_teacher": 8, "data.streaming": True})


def test_what_is_judged_is_what_is_saved(home, tmp_path):
    result = train_model(healing(home, 8, dtype="bfloat16"), tmp_path / "out", quiet=True).dump()
    model = checkpoint.load_model(str(tmp_path / "out"))
    assert model.dtype == torch.bfloat16
    again = healing(home, 1, start=str(tmp_path / "out"), teacher=str(home / "dense"), dtype="float32")
    assert train_model(again, tmp_path / "again", quiet=True).dump()["before"] == pytest.approx(
        result["val_perplexity"], rel=1e-5
    )


def test_experts_of_a_converted_model_begin_no_worse_than_it_and_learn(home, tmp_path):
    static = train_model(healing(home, steps=1), tmp_path / "static", quiet=True).before
    moe = {"ffn.moe": {"experts": 4, "top_k": 2}}
    recipe = healing(home, **moe)
    planned = plan(recipe)
    result = train_model(recipe, tmp_path / "out", quiet=True)
    assert result.before <= static * 1.001 and result.val_perplexity < result.before
    assert result.ffn.stored == planned.ffn.stored and result.ffn.macs == planned.ffn.macs
    assert result.routing.load_max < 4 and result.routing.similarity < 0.9999
    assert recipes.load(str(tmp_path / "out/recipe.yaml")) == recipe
    assert evaluate(str(tmp_path / "out"), data=str(home / "text.jsonl")).perplexity > 1
    with pytest.raises(BadInput, match="has experts already"):
        plan(recipe.model_copy(update={"start": str(tmp_path / "out"), "teacher": str(home / "dense")}))
    with pytest.raises(BadInput, match="is dense: convert it"):
        plan(recipe.model_copy(update={"start": str(home / "dense"), "teacher": str(home / "dense")}))
