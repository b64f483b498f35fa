"""Find the transformer blocks of every architecture by one rule: those of the text tower, or a one-line error."""

import pytest
import torch
from transformers import AutoConfig, T5Config, T5ForConditionalGeneration

from pilon_compress.errors import BadInput
from pilon_compress.models.blocks import block_path, blocks
from pilon_compress.models.families import FAMILIES, find_sites
from pilon_compress.models.task import text_config

PATHS = {"gpt2": "h", "opt": "decoder.layers", "distilbert": "transformer.layer"}
PATHS |= dict.fromkeys(("bert", "roberta"), "encoder.layer")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_known_architectures(tiny, family):
    path = PATHS.get(family, "layers")
    model = tiny.tiny_model(family)
    assert list(blocks(model)) == [f"{path}.{index}" for index in range(3)]
    assert block_path(tiny.tiny_model(family, "base")) == path, "names count from the base model"


@pytest.mark.parametrize(
    "name, path",
    [
        ("t5", "encoder.block"),
        ("xlnet", "layer"),
        ("mamba", "layers"),
        ("llava", "language_model.layers"),
        ("qwen2_audio", "language_model.layers"),
        ("qwen2_vl", "language_model.layers"),
    ],
)
def test_blocks_of_the_text_tower(tiny, name, path):
    """The other tower of llava, qwen2_audio and qwen2_vl is deeper."""
    assert list(blocks(tiny.other_model(name))) == [f"{path}.{index}" for index in range(3)]


def test_a_longer_list_beside_the_blocks_is_not_taken(tiny):
    model = tiny.tiny_model("llama", num_hidden_layers=2)
    model.model.adapters = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(32, 32)) for _ in range(9))
    assert list(blocks(model)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("vit", "ViTModel reads pixel_values, not token ids"),
        ("wav2vec2", "Wav2Vec2Model reads input_values, not token ids"),
        ("clip", "CLIPModel reads pairs of text and other input"),
        ("bart", "bart is an encoder-decoder model"),
    ],
)
def test_what_does_not_read_tokens_is_refused(tiny, name, reason):
    model = tiny.other_model(name)
    for refused in (blocks, find_sites):
        with pytest.raises(BadInput, match=reason):
            refused(model)


def test_of_t5_only_the_encoder_alone_is_taken(tiny):
    whole = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64, vocab_size=264))
    with pytest.raises(BadInput, match="encoder-decoder"):
        find_sites(whole)
    assert {site.role for site in find_sites(tiny.other_model("t5"))} == {"gate", "up", "down"}


def test_text_settings_of_a_composite_config(tiny):
    model = tiny.other_model("llava")
    assert text_config(model.config).vocab_size == tiny.VOCAB
    plain = AutoConfig.for_model("llama")
    assert text_config(plain) is plain
