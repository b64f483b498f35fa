"""The stream of blocks is the model, for every way in which architectures call their blocks, or one line refuses."""

import pytest
import torch

from pilon_compress.config.conversion import build
from pilon_compress.convert.calibrate.second_moments import gather
from pilon_compress.convert.pipeline import convert
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.families import find_sites
from pilon_compress.models.forward import last_states
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source, Streamed
from pilon_compress.models.stream_check import check_stream, check_walk

CPU = torch.device("cpu")
ENCODERS = ("xlnet", "deberta-v2", "deberta", "t5", "modernbert")
WALKED = ("deberta-v2", "deberta", "openai-gpt", "t5", "xlnet", "rwkv", "gemma3_text", "modernbert", "falcon", "bloom")
WALKED += ("mamba", "jamba", "qwen2_moe", "mixtral", "llava", "qwen2_audio", "qwen2_vl")


def batch(rows=3, tokens=14, padded=False):
    ids = torch.randint(5, 200, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, tokens // 2 :] = 0
    return Batch(ids, mask)


@pytest.mark.parametrize("name", WALKED)
def test_the_stream_is_the_model(tiny, name):
    source = Source(tiny.other_model(name))
    assert check_stream(source, batch(padded=name in ENCODERS), head=name not in ENCODERS) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "bert"])
def test_the_stream_is_the_model_for_known_architectures(tiny, family):
    assert check_stream(Source(tiny.tiny_model(family)), batch()) < 1e-5


@pytest.mark.parametrize(
    "name, reason",
    [
        ("albert", "runs 1 blocks 3 times, with the same weights"),
        ("funnel", "does not run each of its 3 blocks once"),
        ("xlm", "XLMWithLMHeadModel is more than its 3 blocks"),
    ],
)
def test_other_architectures_are_refused_by_name(tiny, name, reason):
    with pytest.raises(BadInput, match=reason) as refusal:
        check_stream(Source(tiny.other_model(name)), batch())
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_walked_is_refused_before_weights_are_read(tiny):
    with pytest.raises(BadInput, match="AlbertModel runs 1 blocks 3 times"):
        check_walk(checkpoint.empty_model(tiny.other_model("albert").config))
    for name in ("t5", "xlnet", "mamba", "llava"):
        check_walk(checkpoint.empty_model(tiny.other_model(name).config))


def test_a_step_between_the_blocks_is_noticed(tiny):
    """DeBERTa v2 may run a convolution behind its first block, where the stream does not see it."""
    settings = {"conv_kernel_size": 3, "conv_act": "gelu"}
    with pytest.raises(BadInput, match="DebertaV2ForMaskedLM is more than its 3 blocks"):
        check_stream(Source(tiny.other_model("deberta-v2", **settings)), batch())


def test_a_model_that_cannot_run_is_refused_in_one_line(tiny):
    ids = torch.full((2, 9), 5000)
    with pytest.raises(BadInput, match="LlamaForCausalLM does not run on token ids block by block .index out of range"):
        check_stream(Source(tiny.tiny_model("llama")), Batch(ids, torch.ones_like(ids)))


def test_half_precision_is_compared_as_such(tiny):
    assert check_stream(Source(tiny.tiny_model("llama").to(torch.bfloat16)), batch()) < 1e-2


@pytest.mark.parametrize("name", ["t5", "xlnet"])
def test_a_streamed_model_is_checked_with_its_own_weights(tiny, tmp_path, name):
    tiny.other_model(name).save_pretrained(tmp_path)
    source = Streamed(str(tmp_path), torch.float32, CPU)
    assert check_stream(source, batch()) < 1e-5
    assert all(p.is_meta for name in source.names for p in source.model.base_model.get_submodule(name).parameters())


@pytest.mark.parametrize("shape", [(8, 8), (3, 14), (1, 1)])
def test_tokens_first_is_told_from_rows_first(tiny, shape):
    """XLNet passes on (T, B, d): moments must leave padding out where it is, for as many rows as tokens too."""
    model = tiny.other_model("xlnet").transformer
    source, part = Source(model), batch(*shape, padded=shape[1] > 1)
    stream = Stream(source, [part])
    assert stream.hidden[0].shape[:2] == shape
    sites = find_sites(model)
    up = next(site for site in sites if site.role == "up")
    seen = []
    handle = model.get_submodule(up.name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last_states(model, part)
    handle.remove()
    expected = seen[0].transpose(0, 1)[part.attention_mask.bool()].mean(0)
    moment = gather(source, [part], sites, causal=False).input(up)
    assert moment.count == int(part.attention_mask.sum())
    torch.testing.assert_close(moment.mean, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "xlnet", "openai-gpt", "deberta"])
def test_conversion_at_full_rank_reproduces_the_model(tiny, tmp_path, name):
    tiny.other_model(name).save_pretrained(tmp_path / "dense")
    tiny.tiny_tokenizer(ends=True).save_pretrained(tmp_path / "dense")
    paragraphs = (
        f"Paragraph {i} tells of many things, and of nothing else but the very things that it names." for i in range(60)
    )
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 16, "sequence_length": 32, "batch_size": 8}
    budget = {"ffn_ratio": 2.0, "allow_larger": True}
    settings = {"model": str(tmp_path / "dense"), "calibration": calibration, "budget": budget}
    convert(build({**settings, "evaluation": {"data": "none"}}), tmp_path / "full")
    part = batch()
    dense, full = (last_states(checkpoint.load_model(str(tmp_path / one)), part) for one in ("dense", "full"))
    torch.testing.assert_close(full, dense, rtol=1e-4, atol=1e-4)
