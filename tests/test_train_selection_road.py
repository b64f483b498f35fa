"""A training that explores its selection, from the recipe to the folder: what is left in the end, and resuming."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pilon_compress.config import training
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.fold import prune_unused
from pilon_compress.nn.installed import banks, projections
from pilon_compress.optimize.monitor import read_metrics
from pilon_compress.train.pipeline import train_model

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 300,
}
FFN = {"rank": 2, "n_primitives": 12, "top_k": 3, "bands": 2, "ffn_ratio": 1, "mac_ratio": 1}


def run_recipe(folder, explore, **run):
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": f"{i} " + "abcd " * 40}) for i in range(60)))
    data = {"source": str(folder / "t.jsonl"), "sequence_length": 16, "validation_sequences": 4}
    asked = {
        "task": "pretrain",
        "host": {**SHAPE, "vocab_size": 300, "tokenizer": "bpe"},
        "ffn": FFN,
        "data": data,
        "device": "cpu",
    }
    asked["research"] = {"original": {"selection": {"explore": explore, "until": 0.5}}}
    run = {"batch_size": 4, "evaluate_every": 8, **run}
    return training.build({**asked, "schedule": {"tokens": 8 * 4 * 16}, "run": run})


@pytest.mark.parametrize("explore", ["anneal", "gumbel"])
def test_trained_to_a_plain_model_without_unused_primitives(tmp_path, explore):
    result = train_model(run_recipe(tmp_path, explore), tmp_path / "out", quiet=True).dump()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert prune_unused(copy.deepcopy(model)) == 0
    assert all(type(layer) is ComposedLinear and layer.top_k == 3 for _, layer in projections(model))
    used = {bank.n_primitives for _, bank in banks(model)}
    assert max(used) <= 6, "two layers a band select three each"
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    last = [line for line in read_metrics(tmp_path / "out") if "val_perplexity" in line][-1]
    assert last["tokens"] == result["tokens"] and 0 < last["utilisation"] <= 0.5
    assert last["val_perplexity"] == pytest.approx(result["val_perplexity"])
    for name in ("README.md", "train.html", "curves.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path):
    settings = run_recipe(tmp_path, "gumbel", checkpoint_every=1e-9, keep=99)
    train_model(settings, tmp_path / "whole", quiet=True)
    for folder in (tmp_path / "whole" / "checkpoints").glob("step-*"):
        if folder.name > "step-00000003":
            continue
        target = tmp_path / "part" / "checkpoints" / folder.name
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
    for name in ("recipe.yaml", "metrics.jsonl"):
        (tmp_path / "part" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "whole" / "checkpoints" / "tokenizer").rename(tmp_path / "part" / "checkpoints" / "tokenizer")
    train_model(settings, tmp_path / "part", resume=True, quiet=True)
    one, other = (load_file(tmp_path / which / "model.safetensors") for which in ("whole", "part"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
