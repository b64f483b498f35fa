"""A model read block by block is the model that transformers loads, bit for bit."""

import pytest
import torch

from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.blocks import blocks
from pilon_compress.models.families import FAMILIES
from pilon_compress.models.source import NotStreamable, Source, Streamed, open_source

CPU = torch.device("cpu")


def assert_same(whole, streamed):
    """Return every parameter and buffer, inside the blocks and outside."""
    inside = tuple(f"{whole._prefix()}{name}." for name in whole.names)
    mine = dict(streamed.model.state_dict(keep_vars=True))
    for name, tensor in whole.model.state_dict().items():
        if name.startswith(inside):
            assert mine[name].is_meta, f"{name} takes memory while nobody reads it"
        else:
            assert torch.equal(tensor, mine[name]), name
    for index, dense in enumerate(blocks(whole.model).values()):
        with streamed.block(index) as block:
            theirs = dict(block.named_parameters())
            assert all(torch.equal(p, theirs[name]) for name, p in dense.named_parameters())
    buffers = dict(streamed.model.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.model.named_buffers())


@pytest.mark.parametrize("heads", ["lm", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_whole(tiny, tmp_path, family, heads):
    tiny.save_tiny(family, tmp_path, heads)
    whole, streamed = Source(checkpoint.load_model(str(tmp_path))), Streamed(str(tmp_path), torch.float32, CPU)
    assert_same(whole, streamed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), streamed.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_and_sharded_half_precision_files(tiny, tmp_path, tied):
    model = tiny.tiny_model("llama", tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    streamed = Streamed(str(tmp_path), torch.float32, CPU)
    assert_same(Source(checkpoint.load_model(str(tmp_path), dtype="float32")), streamed)
    assert (streamed.model.lm_head.weight is streamed.model.get_input_embeddings().weight) == tied


def test_a_headless_file_serves_a_model_with_a_head(tiny, tmp_path):
    model = tiny.tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path)
    assert_same(Source(checkpoint.load_model(str(tmp_path))), Streamed(str(tmp_path), torch.float32, CPU))


def test_other_names_are_loaded_whole_with_one_line(tiny, tmp_path, said, monkeypatch):
    tiny.save_tiny("gpt2", tmp_path)
    monkeypatch.setattr(Streamed, "_locate", _nothing)
    source = open_source(str(tmp_path), 10**6, torch.float32, CPU, 1e-3)
    assert not source.streamed
    assert len(said()) == 1


def _nothing(*_):
    raise NotStreamable("the folder names h.0 otherwise: it cannot be read block by block")


def test_small_models_are_loaded_whole(tiny, tmp_path):
    tiny.save_tiny("bert", tmp_path)
    assert not open_source(str(tmp_path), 10**6, torch.float32, CPU, None).streamed
    assert not open_source(str(tmp_path), 10**6, torch.float32, CPU, 0.01).streamed
    assert open_source(str(tmp_path), 10**6, torch.float32, CPU, 0.005).streamed


def test_nan_is_refused_where_it_is_read(tiny, tmp_path):
    model = tiny.tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    source = Streamed(str(tmp_path), torch.float32, CPU)
    with pytest.raises(BadInput, match="layers.1.mlp.up_proj.weight holds NaN"), source.block(1):
        pass
