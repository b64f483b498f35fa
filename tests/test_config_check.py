"""Shapes that no model has are refused before anything of that size is made."""

import json

import pytest
from transformers import AutoConfig

from pilon_compress.errors import BadInput
from pilon_compress.models.config_check import check_declared, check_shapes


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5", "xlnet", "llava", "gemma3", "deepseek_v3"])
def test_configs_that_transformers_ships_pass(name):
    config = AutoConfig.for_model(name)
    assert check_shapes(config) is None
    assert check_declared(config.to_dict()) is None


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("llama", {"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000, at most"),
        ("gpt2", {"n_layer": 20_000}, "n_layer is 20000"),
        ("t5", {"num_layers": 20_000}, "num_layers is 20000"),
        ("llama", {"hidden_size": 2**30, "intermediate_size": 2**32}, "parameters: too large"),
        ("llama", {"vocab_size": 2**62}, "vocab_size is 4.*, at most"),
        ("llama", {"intermediate_size": 2**62}, "intermediate_size is"),
        ("llama", {"hidden_size": 0}, "hidden_size should be a positive integer .got 0."),
        ("llama", {"num_attention_heads": -4}, "num_attention_heads should be a positive integer"),
        ("bert", {"vocab_size": -1}, "vocab_size should be a positive"),
        ("mixtral", {"num_local_experts": 10**9}, "num_local_experts is 1000000000"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(name, changes, reason):
    config = AutoConfig.for_model(name)
    for key, value in changes.items():
        object.__setattr__(config, key, value)
    with pytest.raises(BadInput, match=reason) as refusal:
        check_shapes(config)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200


@pytest.mark.parametrize("value", [True, "12", 3.5])
def test_sizes_are_whole_numbers(value):
    config = AutoConfig.for_model("llama")
    object.__setattr__(config, "hidden_size", value)
    with pytest.raises(BadInput, match="hidden_size should be a positive integer"):
        check_shapes(config)


def test_a_tower_inside_is_checked_too():
    config = AutoConfig.for_model("llava")
    config.vision_config.num_hidden_layers = 10**6
    with pytest.raises(BadInput, match="num_hidden_layers is 1000000"):
        check_shapes(config)
    nested = {"model_type": "llava", "text_config": {"towers": [{"num_hidden_layers": 10**9}]}}
    with pytest.raises(BadInput, match="config.json of llava: num_hidden_layers is 1000000000"):
        check_declared(nested)


def test_inspect_of_a_million_layers_ends_at_once(cli, tiny, tmp_path):
    tiny.save_tiny("qwen2", tmp_path / "deep")
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    (tmp_path / "deep" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1_000_000}))
    refused = cli("inspect", "deep", cwd=tmp_path, code=2)
    assert "num_hidden_layers is 1000000" in refused.stderr
    assert refused.stderr.strip().count("\n") == 0
