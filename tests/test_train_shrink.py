"""Shrinking in steps ends at the last ratio, follows the dense model throughout, and goes on where it stopped."""

import json
import pydoc_data.topics

import pytest
import torch

from pilon_compress.config import training as recipes
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.provenance import lineage
from pilon_compress.train import progressive
from pilon_compress.train.pipeline import plan, train_model


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shrink")
    topics = [topic for _, topic in sorted(pydoc_data.topics.topics.items())][:20]
    parts = [part for topic in topics for part in topic.split("\n\n") if len(part) > 60]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in parts))
    tiny.save_tiny("llama", folder / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PILON_CACHE", str(folder / "cache"))
        yield folder


def asked(folder, **changes):
    made = {
        "task": "heal",
        "start": str(folder / "dense"),
        "shrink": [0.6, 0.3],
        "data": {"source": str(folder / "text.jsonl"), "sequence_length": 32, "validation_sequences": 4},
        "schedule": {"tokens": 2 * 4 * 4 * 32},
        "run": {"batch_size": 4},
    }
    return recipes.build(made, [f"{name}={json.dumps(value)}" for name, value in changes.items()])


def test_the_last_ratio_is_what_comes_out_and_a_killed_run_goes_on(home, tmp_path, monkeypatch):
    out, calls, plain = tmp_path / "out", [], progressive.convert

    def counted(settings, output, **options):
        calls.append(settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(settings, output, **options)

    monkeypatch.setattr(progressive, "convert", counted)
    with pytest.raises(KeyboardInterrupt):
        train_model(asked(home), out, quiet=True)
    assert not (out / "config.json").exists()
    result = train_model(asked(home), out, resume=True, quiet=True).dump()
    assert [call.budget.ffn_ratio for call in calls] == [0.6, 0.3, 0.3], "the first stage was not made again"
    assert calls[0].model == str(home / "dense") and calls[2].model.endswith("0.6/dense")
    assert 0.2 < result["ffn"]["stored_ratio"] <= 0.3 and result["teacher_model"] == str(home / "dense")
    assert [stage["ratio"] for stage in result["stages"]] == [0.6, 0.3]
    assert result["tokens"] == sum(stage["tokens"] for stage in result["stages"]) <= 1024
    model = checkpoint.load_model(str(out))
    stage = checkpoint.load_model(str(out / "stages" / "0.3" / "healed")).state_dict()
    assert all(torch.equal(tensor, stage[name]) for name, tensor in model.state_dict().items())
    assert lineage(out).dense == str(home / "dense")
    assert json.loads((out / "train.json").read_text()) == result
    assert checkpoint.load_tokenizer(str(out)) and plan(asked(home)).ffn.stored_ratio == 0.3


def pilon(home):
    """A folder that says it is PILON."""
    folder = home / "pilon"
    folder.mkdir()
    config = json.loads((home / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "pilon"}}))
    return folder


def test_what_cannot_be_shrunk_is_refused(home, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="must fall"):
        asked(home, shrink=[0.3, 0.6])
    with pytest.raises(BadInput, match="task heal"):
        recipes.build({"task": "pretrain", "shrink": [0.5]})
    with pytest.raises(BadInput, match="already a PILON model"):
        plan(asked(home, start=str(pilon(home))))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="torchrun"):
        train_model(asked(home), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
