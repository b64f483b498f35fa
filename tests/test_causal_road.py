"""The whole road for causal LMs that have learnt something: train a small one, convert it, load it, judge it."""

import pydoc_data.topics

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pilon_compress.config.conversion import build
from pilon_compress.convert.pipeline import convert
from pilon_compress.export.run import export

TOPICS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
TRAIN, HELD_OUT = TOPICS[4:], TOPICS[:4]
VOCAB, HIDDEN, LAYERS, STEPS = 512, 64, 4, 200


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TRAIN, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def untrained(shape):
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if shape == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=4,
            n_positions=256,
            resid_pdrop=0,
            embd_pdrop=0,
            **ends,
        )
        return GPT2LMHeadModel(config)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=160,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            **ends,
        )
    )


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def dense(request, tokenizer, tmp_path_factory):
    """A folder with a small LM of that shape, trained for a moment on Python's documentation."""
    model = untrained(request.param)
    ids = torch.tensor([i for text in TRAIN[::8] for i in [*tokenizer(text)["input_ids"], 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - 128, (8,), generator=generator)
        batch = torch.stack([ids[s : s + 128] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 4.2, "it must have learnt more than letter frequencies"
    folder = tmp_path_factory.mktemp(request.param) / "dense"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "calibration.txt").write_text("\n\n".join(TRAIN))
    (folder / "held-out.txt").write_text("\n\n".join(HELD_OUT))
    return folder


def run(dense, texts, out, **options):
    data = {
        "model": str(dense),
        "calibration": {"data": str(texts / "calibration.txt"), "samples": 64, "sequence_length": 128},
        "evaluation": {"data": str(texts / "held-out.txt"), "samples": 60, "window": 128},
        **options,
    }
    return convert(build(data), out).dump()


@pytest.fixture(scope="module")
def half(dense, texts):
    """The conversion of `dense` to half its feed-forward parameters: its folder and its report."""
    return dense.with_name("half"), run(dense, texts, dense.with_name("half"), budget={"ffn_ratio": 0.5})


def logits(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits


def test_full_rank_plan_reproduces_the_logits(dense, texts, tmp_path):
    report = run(dense, texts, tmp_path / "full", budget={"ffn_ratio": 2.0, "allow_larger": True})
    ids = torch.arange(1, 201).reshape(2, 100)
    torch.testing.assert_close(logits(tmp_path / "full", ids), logits(dense, ids), rtol=0, atol=1e-4)
    assert report["evaluation"]["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert report["evaluation"]["top1_agreement"] > 0.999


def test_half_beats_plain_svd_and_is_honestly_reported(dense, half, texts, tmp_path):
    _, ours = half
    plain = run(dense, texts, tmp_path / "svd", budget={"ffn_ratio": 0.5}, method="svd")
    assert 1 < ours["evaluation"]["perplexity_ratio"] < plain["evaluation"]["perplexity_ratio"]
    assert ours["whitened_loss"]["pilon"] <= ours["whitened_loss"]["whitened-svd"] < ours["whitened_loss"]["svd"]
    for report in (ours, plain):
        assert 0.45 < report["ffn"]["stored_ratio"] <= 0.5
        assert report["ffn"]["mac_ratio"] <= 1
    assert plain["ffn"]["mac_ratio"] <= 0.5, "private ranks save MACs as they save parameters"


def test_cached_greedy_decoding_equals_full_forward(half):
    model = AutoModelForCausalLM.from_pretrained(half[0])
    ids = torch.arange(1, 11)[None]
    cached = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    full = ids
    with torch.no_grad():
        for _ in range(16):
            full = torch.cat([full, model(full).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, full)


def test_same_seed_same_bytes(dense, half, texts, tmp_path):
    run(dense, texts, tmp_path / "again", budget={"ffn_ratio": 0.5}, evaluation={"data": "none"})
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (half[0], tmp_path / "again"))
    assert first == second


def test_dense_export_of_a_converted_model(half, tmp_path):
    export(str(half[0]), tmp_path / "plain", "dense")
    ids = torch.arange(1, 101)[None]
    torch.testing.assert_close(logits(tmp_path / "plain", ids), logits(half[0], ids), rtol=0, atol=1e-5)
    assert "pilon" not in (tmp_path / "plain" / "config.json").read_text()
