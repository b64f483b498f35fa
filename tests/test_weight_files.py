"""The files that hold a model are those that transformers reads, and no others."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pilon_compress.errors import BadInput
from pilon_compress.models.files import weight_files
from pilon_compress.models.source import Streamed


def names(folder):
    return [path.name for path in weight_files(folder)]


def stray(folder, name):
    save_file({"model.embed_tokens.weight": torch.zeros(264, 32)}, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("shards", ["10MB", "20KB"])
@pytest.mark.parametrize("name", ["ema.safetensors", "zz.safetensors", "model.fp16.safetensors"])
def test_files_beside_the_model_are_not_read(tiny, tmp_path, shards, name):
    model = tiny.tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size=shards)
    own = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    stray(tmp_path, name)
    assert names(tmp_path) == own and (len(own) > 1) == (shards == "20KB")
    streamed = Streamed(str(tmp_path), torch.float32, torch.device("cpu"))
    assert torch.equal(streamed.model.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_one_file_wins_over_an_index_and_the_config_over_both(tiny, tmp_path):
    tiny.tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    tiny.tiny_model("llama").save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert names(tmp_path) == ["model.safetensors"], "as transformers"
    stray(tmp_path, "other.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert names(tmp_path) == ["other.safetensors"]


@pytest.mark.parametrize(
    "files, reason",
    [
        ({}, "no weights"),
        ({"pytorch_model.bin": "x"}, "only pickled weights"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": "x"}, "an adapter .LoRA., not a model"),
        ({"weights.safetensors": "x"}, "no model.safetensors and no index, only weights.safetensors"),
        ({"model.safetensors.index.json": "[]"}, "is not a JSON object"),
        ({"model.safetensors.index.json": "{"}, "cannot be read"),
        ({"model.safetensors.index.json": '{"weight_map": {}}'}, "is not a weight index"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": 1}}'}, "is not a weight index"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "b.safetensors"}}'}, "lacks b.safetensors"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "../b.safetensors"}}'}, "no safetensors file in the"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "/b.safetensors"}}'}, "no safetensors file in the"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "pytorch_model.bin"}}'}, "no safetensors file in the"),
        ({"config.json": '{"transformers_weights": "../model.safetensors"}'}, "no safetensors file in the"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, files, reason):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=reason) as refusal:
        weight_files(tmp_path)
    assert "\n" not in str(refusal.value)
