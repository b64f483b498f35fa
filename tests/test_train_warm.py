"""Models from scratch that begin dense: one command, the budget kept, and a schedule that is cut in two."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import pilon_compress  # noqa: F401  registers the format
from pilon_compress.config import training
from pilon_compress.errors import BadInput
from pilon_compress.nn.installed import layout_of
from pilon_compress.train.dense_warmup import stages
from pilon_compress.train.pipeline import train_model

ASKED = ["ffn.dense_until=0.5", "schedule.tokens=16384", "run.evaluate_every=100"]


def test_one_run_ends_as_a_pilon_model_of_the_budget_and_is_not_made_again(tmp_path):
    asked, output = training.load("smoke", ASKED), tmp_path / "out"
    result = train_model(asked, output, quiet=True).dump()
    assert result["tokens"] == 16384 and result["ffn"]["stored_ratio"] <= 0.5 and result["ffn"]["mac_ratio"] <= 0.5
    assert result["task"] == "pretrain" and [one["tokens"] for one in result["stages"]] == [8192, 8192]
    early, late = (one["val_perplexity"] for one in result["stages"])
    assert result["val_perplexity"] == late < early
    layout = layout_of(AutoModelForCausalLM.from_pretrained(output))
    assert layout.projections or layout.matrices
    assert json.loads((output / "train.json").read_text()) == result
    assert "dense for the first 50% of its tokens" in (output / "README.md").read_text()
    again = train_model(asked, output, resume=True, quiet=True).dump()
    assert again["val_perplexity"] == late


def test_a_ternary_one_is_converted_to_ranks_of_whole_tiles(tmp_path):
    asked = [*ASKED, "ternary.enabled=true", "schedule.tokens=4096"]
    train_model(training.load("smoke", asked), tmp_path / "out", quiet=True)
    layout = layout_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert layout.is_ternary and all(bank.rank % 16 == 0 for bank in layout.banks.values())


def test_the_schedule_is_cut_in_two():
    asked = training.load("smoke", [*ASKED, "schedule.warmup=0.1", "schedule.decay=0.3", "ffn.dense_after=0.5"])
    first, second = stages(asked, Path("stages"))
    assert first.ffn.kind == "dense" and first.schedule.decay == 0 and first.schedule.warmup == pytest.approx(0.2)
    assert second.schedule.decay == pytest.approx(0.4) and second.start == str(Path("stages") / "converted")
    assert second.optimizer.learning_rate == pytest.approx(asked.optimizer.learning_rate / 2)
    assert second.distill.kl == 0 and second.seed != first.seed


def test_it_needs_a_budget_of_tokens_and_a_schedule_that_can_be_cut():
    with pytest.raises(BadInput, match="ffn.dense_until: needs schedule.tokens"):
        training.load("smoke", [*ASKED, "schedule.kind=cosine"])
