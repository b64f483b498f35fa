"""`pilon-compress train`, as its users meet it: one command makes a model, whatever interrupts it."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pilon_compress.config import training
from pilon_compress.errors import BadInput
from pilon_compress.optimize.monitor import read_metrics
from pilon_compress.train.pipeline import plan, train_model

SHORT = ("schedule.tokens=24576", "run.checkpoint_every=0.01", "device=cpu")  # 24 steps
WORDS = ["train", "--recipe", "smoke", *(word for item in SHORT for word in ("--set", item)), "--json"]


@pytest.fixture(scope="module", autouse=True)
def tokens(tmp_path_factory):
    """The folder where all trainings here look for tokens: the text is tokenised once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PILON_CACHE", str(tmp_path_factory.mktemp("tokens")))
        yield os.environ["PILON_CACHE"]


@pytest.fixture(scope="module")
def start(cli, tokens):
    """`start(folder, *words)` starts such a training there."""
    return lambda folder, *words, **options: cli.start(*WORDS, *words, cwd=folder, PILON_CACHE=tokens, **options)


def until_checkpoint(folder: Path, process: Any) -> None:
    while not list(folder.glob("checkpoints/step-*/state.json")):
        assert process.poll() is None, process.end()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """A finished smoke run: (folder, what --json printed)."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, json.loads(start(folder, "-o", "out").end().stdout)


def test_one_command_makes_a_model_within_its_budget_that_transformers_loads(undisturbed):
    folder, result = undisturbed
    assert result["tokens"] == 24 * 16 * 64 and result["output"] == "out"
    assert 0.45 < result["ffn"]["stored_ratio"] <= 0.5 and 0.45 < result["ffn"]["mac_ratio"] <= 0.5
    assert result["val_perplexity"] < 300 < 512  # of 512 tokens: it has learnt something
    model = AutoModelForCausalLM.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert model.get_input_embeddings().num_embeddings == 512 and tokenizer.eos_token == "<eos>"
    assert model(**tokenizer("The bank", return_tensors="pt")).logits.isfinite().all()
    assert training.load(str(folder / "out" / "recipe.yaml")).host.hidden_size == 64
    steps = [line["step"] for line in read_metrics(folder / "out") if "loss" in line]
    assert steps == [1, 10, 20, 24]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_whatever_stops_it_resuming_ends_with_the_same_weights(start, undisturbed, tmp_path, number, code):
    folder, expected = undisturbed
    process = start(tmp_path, "-o", "out")
    until_checkpoint(tmp_path / "out", process)
    process.send_signal(number)
    err = process.end(code).stderr
    if code > 0:
        assert "--resume" in err and "Traceback" not in err
    out = start(tmp_path, "-o", "out", "--resume").end().stdout
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "out/model.safetensors").read_bytes()
    assert json.loads(out)["val_perplexity"] == expected["val_perplexity"]
    steps = [line["step"] for line in read_metrics(tmp_path / "out") if "loss" in line]
    assert steps == [1, 10, 20, 24]  # none twice


def test_a_full_disk_keeps_the_checkpoint_before(start, tmp_path):
    quick(tmp_path, "run.checkpoint_every=0.001", "schedule.tokens=8192")
    for path in (tmp_path / "out/checkpoints").glob("step-*8"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    words = ("-o", "out", "--resume", "--set", "schedule.tokens=8192")
    process = start(tmp_path, *words, file_limit=1_500_000)  # bytes; a checkpoint has 2 MB
    err = process.end(2).stderr
    assert err.strip().splitlines()[-1] == ("error: no checkpoint of step 8: file too large; that of step 7 stays")
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir() if path.name != "tokenizer"] == [
        "step-00000007"
    ]


def quick(tmp_path, *overrides: str, **options):
    settings = training.load("smoke", [*SHORT, "schedule.tokens=4096", "run.checkpoint_every=1e9", *overrides])
    return train_model(settings, tmp_path / "out", quiet=True, **options).dump()


def test_a_loss_that_is_not_finite_stops_in_one_line_with_the_last_good_checkpoint(tmp_path):
    with pytest.raises(BadInput, match=r"the loss is (nan|inf) at step \d+: lower optimizer.learning_rate; the checkp"):
        quick(tmp_path, "optimizer.learning_rate=1e18", "optimizer.clip=null", "run.checkpoint_every=0.001")
    assert list((tmp_path / "out/checkpoints").glob("step-*/state.json"))
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("kind", ["dense", "lowrank"])
def test_baselines_are_one_flag_away(tmp_path, kind):
    result = quick(tmp_path, f"ffn.kind={kind}")
    assert (result["ffn"]["stored_ratio"] == 1) == (kind == "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hasattr(model.model, "pilon_banks") == (kind == "lowrank")


def test_micro_batches_muon_and_gated_hosts(tmp_path):
    options = ("run.micro_batch_size=4", "optimizer.name=muon", "host.family=llama")
    result = quick(tmp_path, *options, "run.gradient_checkpointing=true")
    assert result["val_perplexity"] < 500
    state = load_file(tmp_path / "out/model.safetensors")
    assert any(".gate.A" in name for name in state)


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    whole = quick(tmp_path, "schedule.tokens=8192")
    parts = quick(tmp_path, "schedule.tokens=8192", "run.micro_batch_size=3", overwrite=True)
    assert parts["val_perplexity"] == pytest.approx(whole["val_perplexity"], rel=1e-4)


def test_resuming_with_another_recipe_is_refused(tmp_path):
    quick(tmp_path)
    with pytest.raises(BadInput, match=r"begun with another optimizer.learning_rate \(0.004, now 0.1\)"):
        quick(tmp_path, "optimizer.learning_rate=0.1", resume=True)
    with pytest.raises(BadInput, match="is not empty"):
        quick(tmp_path)
    assert quick(tmp_path, "run.log_every=3", resume=True)["tokens"] == 4096  # how it is watched may change


def test_a_truncated_checkpoint_is_named_in_one_line(tmp_path):
    quick(tmp_path)
    file = next((tmp_path / "out/checkpoints").glob("step-*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match="shard-.* bytes, but manifest.json says") as caught:
        quick(tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_packed_documents_are_apart_when_asked(tmp_path):
    assert quick(tmp_path, "data.respect_documents=true")["val_perplexity"] < 500


def test_streamed_runs_resume_exactly(tmp_path):
    streamed = ("data.streaming=true", "run.checkpoint_every=0.001")
    whole = quick(tmp_path, *streamed)
    state = load_file(tmp_path / "out/model.safetensors")
    steps = sorted((tmp_path / "out/checkpoints").glob("step-*"))
    for path in steps[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert quick(tmp_path, *streamed, resume=True)["val_perplexity"] == whole["val_perplexity"]
    again = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_plans_are_within_half_of_the_dense_model_stored_and_computed(name):
    planned = plan(training.load(name)).dump()
    assert 0.44 < planned["ffn"]["stored_ratio"] <= 0.5 and 0.44 < planned["ffn"]["mac_ratio"] <= 0.5


@pytest.mark.parametrize("name", ["48m", "360m", "500m"])
def test_recipes_that_share_spend_macs_to_save_numbers_and_their_twins_do_not(name):
    shared, own, neurons = (
        plan(training.load(name, words)).ffn for words in ([], ["ffn.share=none"], ["ffn.primitive=neurons"])
    )
    for found in (shared, neurons):
        assert found.stored_ratio == pytest.approx(0.25, abs=0.01) and found.mac_ratio == pytest.approx(0.75, abs=0.01)
    assert 0.22 < own.stored_ratio <= 0.25 and own.mac_ratio <= 0.25


def test_dry_run_writes_nothing(start, tmp_path):
    out = start(tmp_path, "-o", "out", "--dry-run").end().stdout
    assert json.loads(out)["parameters"] > 100_000 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a --recipe to train from scratch, or a model to --heal, --sft or --exit-gates"),
        (("--recipe", "smoke"), "name the folder to write with -o"),
        (("--heal", "a", "--sft", "b"), "--heal and --sft disagree: leave out one of the two"),
        (
            ("--recipe", "smoke", "-o", "x", "--ffn", "sparse"),
            "--ffn: must be 'pilon', 'lowrank' or 'dense'",
        ),
        (("--heal", "m", "--shrink", "0.4,0.6"), "--shrink: is for task heal, and its ratios must fall"),
        (("--sft", "m", "--ternary"), "--ternary: is for pretrain and heal"),
        (
            ("--recipe", "smoke", "-o", "x", "--set", "host.hidden_size=65"),
            "no multiple of num_attention_heads",
        ),
        (("--recipe", "smoke", "-o", "x", "--data", "nowhere.txt"), "no such file: nowhere.txt"),
        (("--recipe", "smoke", "-o", "x", "--set", "ffn.ffn_ratio=0.001"), "the budget pays for no primitive"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(cli, tmp_path, words, message):
    done = cli("train", *words, cwd=tmp_path, code=2)
    assert message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
