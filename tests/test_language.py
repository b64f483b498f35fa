"""Perplexity and divergence equal what a slow float64 loop over the tokens computes, and say so when they cannot."""

import math

import pytest
import torch
from tokenizers import processors

from pilon_compress.errors import BadInput
from pilon_compress.evaluate import perplexity

DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus Köln: fünf Wörter, 東京 and a 🦊.",
    "",
    "A third text, a little longer than the others, so that it takes several windows to read it.",
]
BYTES = sum(len(document.encode()) for document in DOCUMENTS)


def with_bos(tokenizer):
    """A tokenizer that puts <bos> before every text, as Gemma's and Llama's do."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    return tokenizer


def stream(tokenizer):
    ids = []
    for document in DOCUMENTS:
        ids += [tokenizer.eos_token_id] if document != DOCUMENTS[0] else []
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
    return ids


def plain_loop(models, ids, before, window, stride):
    """The loop of transformers' documentation, BOS before each window: (mean nats of each model, tokens scored)."""
    room, done, sums, tokens = window - len(before), 0, [0.0] * len(models), 0
    for begin in range(0, len(ids), stride):
        end = min(begin + room, len(ids))
        row = torch.tensor([before + ids[begin:end]])
        target = row.clone()
        target[:, : row.shape[1] - (end - done)] = -100
        scored = int((target[:, 1:] != -100).sum())
        for place, model in enumerate(models):
            with torch.no_grad():
                sums[place] += model.double()(row, labels=target).loss.item() * scored if scored else 0.0
        tokens, done = tokens + scored, end
        if end == len(ids):
            break
    return [total / tokens for total in sums], tokens


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(256, None), (16, None), (16, 5), (7, 1)])
def test_the_figure_is_that_of_a_plain_loop(tiny, family, bos, window, stride):
    model, dense = tiny.tiny_model(family, seed=1), tiny.tiny_model(family, seed=0)
    tokenizer = with_bos(tiny.tiny_tokenizer()) if bos else tiny.tiny_tokenizer()
    figures = perplexity.measure(
        model, tokenizer, DOCUMENTS, against=dense, window=window, stride=stride, batch_size=3
    ).dump()
    before = [1] if bos else []
    (nats, dense_nats), tokens = plain_loop([model, dense], stream(tokenizer), before, window, stride or window - bos)
    assert figures["tokens"] == tokens
    assert figures["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert figures["dense_perplexity"] == pytest.approx(math.exp(dense_nats), rel=1e-5)
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(nats - dense_nats), rel=1e-5)
    assert figures["begins_with"] == ("<bos>" if bos else None)
    assert (figures["window"], figures["stride"], figures["eos"]) == (window, stride or window - bos, True)
    per_token = BYTES / len(stream(tokenizer))
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / per_token, rel=1e-5)


def test_divergence_and_agreement_are_those_of_single_tokens(tiny):
    model, dense = tiny.tiny_model("llama", seed=1), tiny.tiny_model("llama", seed=0)
    ids = stream(tiny.tiny_tokenizer())
    rows = []
    for begin in range(0, len(ids), 16):
        row = torch.tensor([ids[begin : begin + 16]])
        with torch.no_grad():
            p, q = (m(row).logits[0, :-1].double().log_softmax(-1) for m in (dense, model))
        rows += zip((p.exp() * (p - q)).sum(-1).tolist(), (p.argmax(-1) == q.argmax(-1)).tolist(), strict=True)
    figures = perplexity.measure(model, tiny.tiny_tokenizer(), DOCUMENTS, against=dense, window=16).dump()
    kl, agreement = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    assert figures["kl"] == pytest.approx(kl, rel=1e-4) and kl > 0.01
    assert figures["top1_agreement"] == pytest.approx(agreement) and figures["tokens"] == len(rows)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_windows_are_counted_as_asked(tiny, count):
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer()
    ids = stream(tokenizer)
    figures = perplexity.measure(model, tokenizer, DOCUMENTS, window=16, max_windows=count).dump()
    (nats,), tokens = plain_loop([model], ids[: 16 * count], [], 16, 16)
    assert figures["tokens"] == tokens == min(15 * count, len(ids) - -(-len(ids) // 16))
    assert figures["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)


def test_a_long_document_is_read_as_far_as_its_windows_go(tiny):
    tokenizer, sizes = tiny.tiny_tokenizer(), []
    plain = type(tokenizer).__call__
    text = "word and word. " * 100_000

    class Counting(type(tokenizer)):
        def __call__(self, text, *args, **options):
            sizes.append(len(text))
            return plain(self, text, *args, **options)

    tokenizer.__class__ = Counting
    model = tiny.tiny_model("gpt2")
    short = perplexity.measure(model, tokenizer, [text], window=32, max_windows=4).dump()
    assert max(sizes) < 10_000
    assert (
        short["perplexity"]
        == perplexity.measure(model, tokenizer, [text[:400]], window=32, max_windows=4).dump()["perplexity"]
    )


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tiny):
    model = tiny.tiny_model("gpt2")
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = perplexity.measure(model, tiny.tiny_tokenizer(), DOCUMENTS).dump()
    assert figures["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)
    bits = figures["tokens"] * math.log2(model.config.vocab_size)
    assert figures["bits_per_byte"] == pytest.approx(bits / figures["bytes"], rel=1e-2)


def test_a_model_against_itself_loses_nothing(tiny):
    model = tiny.tiny_model("llama")
    figures = perplexity.measure(model, tiny.tiny_tokenizer(), DOCUMENTS, against=model).dump()
    assert (figures["perplexity_ratio"], figures["kl"], figures["top1_agreement"]) == (1.0, 0.0, 1.0)


def test_batches_change_nothing(tiny, monkeypatch):
    model, dense, tokenizer = tiny.tiny_model("gpt2", seed=1), tiny.tiny_model("gpt2"), tiny.tiny_tokenizer()
    one, five = (
        perplexity.measure(model, tokenizer, DOCUMENTS, against=dense, window=16, batch_size=size).dump()
        for size in (1, 5)
    )
    for key in ("kind", "begins_with"):  # which have no tolerance
        del one[key], five[key]
    assert one == pytest.approx(five, rel=1e-6)
    monkeypatch.setattr("pilon_compress.nn.functional.LOGITS", 1)  # no room for more than one window at a time
    sizes = set()
    model.register_forward_hook(lambda _m, _args, out: sizes.add(out.logits.shape[0]))
    small = perplexity.measure(model, tokenizer, DOCUMENTS, against=dense, window=16, batch_size=5).dump()
    del small["kind"], small["begins_with"]
    assert small == pytest.approx(five, rel=1e-6) and sizes == {1}


def test_half_precision_is_scored_in_float32(tiny):
    model = tiny.tiny_model("llama").bfloat16()
    ids = stream(tiny.tiny_tokenizer())
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits
    assert logits.dtype == torch.bfloat16
    exact = -logits[0].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).mean().item()
    measured = perplexity.measure(model, tiny.tiny_tokenizer(), DOCUMENTS).dump()["perplexity"]
    assert measured == pytest.approx(math.exp(exact), rel=1e-5)


def test_without_eos_documents_follow_each_other(tiny):
    tokenizer, model = tiny.tiny_tokenizer(eos=False), tiny.tiny_model("llama")
    figures = perplexity.measure(model, tokenizer, ["abc", "def"]).dump()
    assert figures == perplexity.measure(model, tokenizer, ["abcdef"]).dump()
    assert (figures["tokens"], figures["bytes"], figures["eos"]) == (5, 5, False)


def test_the_default_window_is_what_the_model_takes(tiny):
    assert perplexity.default_window(tiny.tiny_model("gpt2")) == tiny.POSITIONS
    assert perplexity.default_window(tiny.tiny_model("llama", max_position_embeddings=4096)) == 1024


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
        perplexity.measure(tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(), documents, **options)


def test_models_that_cannot_be_compared_are_refused(tiny):
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer()
    with pytest.raises(BadInput, match="264 and 300 tokens"):
        perplexity.measure(model, tokenizer, DOCUMENTS, against=tiny.tiny_model("gpt2", vocab_size=300))
    with pytest.raises(BadInput, match="exceeds the model's 64 positions"):
        perplexity.measure(model, tokenizer, DOCUMENTS, against=tiny.tiny_model("gpt2", n_positions=64))


@pytest.mark.parametrize("broken", ["model", "dense"])
def test_nan_predictions_are_not_passed_off_as_a_figure(tiny, broken):
    models = {"model": tiny.tiny_model("gpt2", seed=1), "dense": tiny.tiny_model("gpt2")}
    with torch.no_grad():
        models[broken].transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        perplexity.measure(models["model"], tiny.tiny_tokenizer(), DOCUMENTS, against=models["dense"])
