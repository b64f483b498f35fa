"""Check that a model's task is read from transformers' mappings, and that a language model must not look ahead."""

import json

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertLMHeadModel

from pilon_compress.errors import BadInput
from pilon_compress.evaluate import perplexity
from pilon_compress.models import checkpoint, task
from pilon_compress.models.causality import check_causal


def renamed(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("named", [None, ["LLaMAForCausalLM"], ["llamaforcausallm"], ["SomebodysLlamaForCausalLM"]])
def test_a_decoder_keeps_its_head_whatever_its_class_is_called(tiny, tmp_path, named):
    tiny.save_tiny("llama", tmp_path)
    renamed(tmp_path, architectures=named)
    model = checkpoint.load_model(str(tmp_path))
    assert type(model).__name__ == "LlamaForCausalLM" and task.is_causal(model.config)


def test_a_name_that_is_no_class_is_refused(tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path)
    renamed(tmp_path, architectures=["LlamaForWeather"])
    with pytest.raises(BadInput, match="LlamaForWeather is no architecture"):
        checkpoint.load_config(str(tmp_path))


def test_a_head_without_a_class_is_not_dropped(tiny, tmp_path):
    tiny.save_tiny("bert", tmp_path)  # with a head for masked words
    renamed(tmp_path, architectures=None)
    with pytest.raises(BadInput, match="no place for.*architectures"):
        checkpoint.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "architecture", "changes", "causal"),
    [
        ("llava", "LlavaForConditionalGeneration", {}, True),
        ("gemma3", "Gemma3ForConditionalGeneration", {}, True),
        ("bert", "BertLMHeadModel", {"is_decoder": True}, True),
        ("bert", "BertLMHeadModel", {}, False),
        ("xlnet", "XLNetLMHeadModel", {}, False),
        ("llama", "LlamaForSequenceClassification", {}, False),
        ("t5", "T5EncoderModel", {}, False),
    ],
)
def test_who_predicts_the_next_token(kind, architecture, changes, causal):
    config = AutoConfig.for_model(kind, **changes)
    config.architectures = [architecture]
    assert task.is_causal(config) == causal
    assert task.vocabulary(config) > 0


def test_a_model_that_looks_ahead_has_no_perplexity(tiny):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**sizes, vocab_size=264, initializer_range=0.3)).eval()
    with pytest.raises(BadInput, match="looks at later tokens"):
        perplexity.measure(model, tiny.tiny_tokenizer(), ["some words to be scored"])
    check_causal(tiny.tiny_model("gpt2"), torch.arange(10, 30)[None])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_type_of_the_file_counts_where_the_config_says_none(tiny, tmp_path, stored):
    model = tiny.save_tiny("llama", tmp_path)
    model.to(stored).save_pretrained(tmp_path)
    renamed(tmp_path, dtype=None, torch_dtype=None)
    assert checkpoint.load_config(str(tmp_path)).dtype == stored
    assert checkpoint.load_model(str(tmp_path)).dtype == stored


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin"])
def test_folders_without_weights_that_can_be_read_are_refused_by_every_look_at_them(tiny, tmp_path, name):
    tiny.save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(BadInput, match="LoRA|pickled"):
        checkpoint.load_config(str(tmp_path))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4", None, {}, []])
def test_quantised_checkpoints_are_refused_by_every_look_at_them(tiny, tmp_path, method):
    tiny.save_tiny("llama", tmp_path)
    renamed(tmp_path, quantization_config={"bits": 4} | ({} if method is None else {"quant_method": method}))
    with pytest.raises(BadInput) as refused:
        checkpoint.load_config(str(tmp_path))
    assert "\n" not in str(refused.value)
