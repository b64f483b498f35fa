"""Perplexity and divergence equal what a slow float64 loop over the tokens computes, and say so when they cannot."""

import math

import pytest
import torch

from pilon_compress.errors import BadInput
from pilon_compress.measure import language

DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus Köln: fünf Wörter, 東京 and a 🦊.",
    "",
    "A third text, a little longer than the others, so that it takes several windows to read it.",
]
BYTES = sum(len(document.encode()) for document in DOCUMENTS)


def stream(tokenizer):
    ids = [tokenizer.eos_token_id]
    for document in DOCUMENTS:
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return ids


def by_hand(model, dense, ids, window, stride):
    """One token at a time in float64: (mean nats, mean dense nats, mean KL, top-1 agreement)."""
    rows, done = [], 0
    while done < len(ids) - 1:
        new = min(window if done == 0 else stride, len(ids) - 1 - done)
        for target in range(done + 1, done + new + 1):
            start = max(0, done + new - window)
            context = torch.tensor([ids[start:target]])
            with torch.no_grad():
                p, q = (m(context).logits[0, -1].double().log_softmax(-1) for m in (dense, model))
            agree = float(p.argmax() == q.argmax())
            rows.append([-q[ids[target]].item(), -p[ids[target]].item(), (p.exp() * (p - q)).sum().item(), agree])
        done += new
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize(("window", "stride"), [(256, None), (16, None), (16, 5), (7, 1)])
def test_every_token_is_scored_once_with_the_stated_context(tiny, family, window, stride):
    model, dense = tiny.tiny_model(family, seed=1), tiny.tiny_model(family, seed=0)
    tokenizer = tiny.tiny_tokenizer()
    ids = stream(tokenizer)
    figures = language.measure(model, tokenizer, DOCUMENTS, against=dense, window=window, stride=stride, batch_size=3)
    nats, dense_nats, kl, agreement = by_hand(model, dense, ids, window, stride or window)
    assert figures["tokens"] == len(ids) - 1
    assert figures["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert figures["dense_perplexity"] == pytest.approx(math.exp(dense_nats), rel=1e-5)
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(nats - dense_nats), rel=1e-5)
    assert figures["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.01
    assert figures["top1_agreement"] == pytest.approx(agreement)
    assert figures["bytes"] == BYTES
    assert figures["bits_per_byte"] == pytest.approx(nats * (len(ids) - 1) / math.log(2) / BYTES, rel=1e-5)
    assert (figures["window"], figures["stride"], figures["eos"]) == (window, stride or window, True)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tiny):
    model = tiny.tiny_model("gpt2")
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = language.measure(model, tiny.tiny_tokenizer(), DOCUMENTS)
    assert figures["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)
    bits = figures["tokens"] * math.log2(model.config.vocab_size)
    assert figures["bits_per_byte"] == pytest.approx(bits / BYTES, rel=1e-5)


def test_a_model_against_itself_loses_nothing(tiny):
    model = tiny.tiny_model("llama")
    figures = language.measure(model, tiny.tiny_tokenizer(), DOCUMENTS, against=model)
    assert (figures["perplexity_ratio"], figures["kl"], figures["top1_agreement"]) == (1.0, 0.0, 1.0)


def test_batches_change_nothing(tiny, monkeypatch):
    model, dense, tokenizer = tiny.tiny_model("gpt2", seed=1), tiny.tiny_model("gpt2"), tiny.tiny_tokenizer()
    one, five = (
        language.measure(model, tokenizer, DOCUMENTS, against=dense, window=16, batch_size=size) for size in (1, 5)
    )
    assert one == pytest.approx(five, rel=1e-6)
    monkeypatch.setattr(language, "CHUNK", 3)
    monkeypatch.setattr(language, "LOGITS", 1)  # no room for more than one window at a time
    sizes = set()
    model.register_forward_hook(lambda _m, _args, out: sizes.add(out.logits.shape[0]))
    small = language.measure(model, tokenizer, DOCUMENTS, against=dense, window=16, batch_size=5)
    assert small == pytest.approx(five, rel=1e-6) and sizes == {1}


def test_half_precision_is_scored_in_float32(tiny):
    model = tiny.tiny_model("llama").bfloat16()
    ids = stream(tiny.tiny_tokenizer())
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits
    assert logits.dtype == torch.bfloat16
    exact = -logits[0].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    measured = language.measure(model, tiny.tiny_tokenizer(), DOCUMENTS)["perplexity"]
    assert measured == pytest.approx(math.exp(exact), rel=1e-5)


@pytest.mark.parametrize("limit", [1, 20, 44, 45, 46, 60, 1000])
def test_max_tokens_is_a_limit_and_the_bytes_stay_exact(tiny, limit):
    model = tiny.tiny_model("gpt2")
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = language.measure(model, tiny.tiny_tokenizer(), DOCUMENTS, max_tokens=limit)
    full = len(stream(tiny.tiny_tokenizer())) - 1
    assert min(limit, full) - 3 <= figures["tokens"] <= limit, "a character of four bytes is not cut"
    separators = figures["tokens"] - figures["bytes"]  # this tokenizer makes one token of each byte
    assert 0 <= separators <= len(DOCUMENTS)


def test_without_eos_the_text_begins_with_bos(tiny):
    tokenizer, model = tiny.tiny_tokenizer(eos=False), tiny.tiny_model("llama")
    figures = language.measure(model, tokenizer, ["abcdef"])
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("abcdef", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert (figures["tokens"], figures["bytes"], figures["eos"]) == (6, 6, False)


def test_the_default_window_is_what_the_model_takes(tiny):
    assert language.default_window(tiny.tiny_model("gpt2").config) == tiny.POSITIONS
    assert language.default_window(tiny.tiny_model("llama", max_position_embeddings=4096).config) == 1024


@pytest.mark.parametrize(
    ("documents", "options", "reason"),
    [
        ([], {}, "shorter than two tokens"),
        (DOCUMENTS, {"window": 257}, "257 tokens exceeds the model's 256 positions"),
        (DOCUMENTS, {"window": 16, "stride": 17}, "stride 17 exceeds the window of 16"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, documents, options, reason):
    with pytest.raises(BadInput, match=reason):
        language.measure(tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(), documents, **options)


def test_models_that_cannot_be_compared_are_refused(tiny):
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer()
    with pytest.raises(BadInput, match="264 and 300 tokens"):
        language.measure(model, tokenizer, DOCUMENTS, against=tiny.tiny_model("gpt2", vocab_size=300))
    with pytest.raises(BadInput, match="exceeds the model's 64 positions"):
        language.measure(model, tokenizer, DOCUMENTS, against=tiny.tiny_model("gpt2", n_positions=64))


@pytest.mark.parametrize("broken", ["model", "dense"])
def test_nan_predictions_are_not_passed_off_as_a_figure(tiny, broken):
    models = {"model": tiny.tiny_model("gpt2", seed=1), "dense": tiny.tiny_model("gpt2")}
    with torch.no_grad():
        models[broken].transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        language.measure(models["model"], tiny.tiny_tokenizer(), DOCUMENTS, against=models["dense"])
