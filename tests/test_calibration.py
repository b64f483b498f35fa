"""Streaming moments against float64 brute force."""

import pytest
import torch

from pilon_compress.convert.calibration import Batch, SecondMoment, calibrate, causal_batches, encoder_batches
from pilon_compress.errors import BadInput
from pilon_compress.families import find_sites


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_streaming_equals_float64_brute_force(offset):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    rows = torch.randn(5000, 12, generator=generator, dtype=torch.float64) @ mix + offset
    moment = SecondMoment(12)
    for chunk in rows.float().split([1, 7, 4000, 992]):
        moment.update(chunk)
    exact = torch.cov(rows.T, correction=0)
    assert (moment.covariance() - exact).norm() / exact.norm() < 1e-5
    torch.testing.assert_close(moment.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-4)
    second = rows.T @ rows / len(rows)
    assert (moment.second_moment() - second).norm() / second.norm() < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_calibration_sees_exactly_the_unpadded_inputs(tiny, family):
    model = tiny.tiny_model(family)
    sites = find_sites(model)
    ids = torch.randint(5, 90, (4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[3, 2:] = 0
    seen = {site.input: [] for site in sites}
    handles = [
        model.base_model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen[name].append(args[0].detach()[mask.bool()].double())
        )
        for name in seen
    ]
    with torch.no_grad():
        model.base_model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    moments = calibrate(model, [Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])], sites)
    assert set(moments) == set(seen) and len(moments) == 6, "gate and up share one set of moments"
    for name, moment in moments.items():
        rows = torch.cat(seen[name])
        assert moment.count == len(rows) == int(mask.sum())
        torch.testing.assert_close(moment.covariance(), torch.cov(rows.T, correction=0), rtol=1e-3, atol=1e-6)


def test_nan_activation_is_refused(tiny):
    model = tiny.tiny_model("bert")
    with torch.no_grad():
        model.base_model.embeddings.word_embeddings.weight[7] = float("nan")
    ids = torch.full((2, 5), 7)
    with pytest.raises(BadInput, match="NaN"):
        calibrate(model, [Batch(ids, torch.ones_like(ids))], find_sites(model))


def test_causal_blocks_join_documents_by_eos(tiny):
    tokenizer = tiny.tiny_tokenizer()
    documents = ["one two three", "four five", "six seven eight nine ten"]
    batches = causal_batches(tokenizer, documents, length=4, samples=100, batch_size=2)
    flat = torch.cat([b.input_ids.reshape(-1) for b in batches]).tolist()
    expected = []
    for document in documents:
        expected += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert flat == expected[: len(flat)] and len(expected) - len(flat) < 4
    assert sum(len(b.input_ids) for b in causal_batches(tokenizer, documents * 50, 4, 3, 2)) == 3


def test_encoder_batches_pad_and_mask(tiny):
    tokenizer = tiny.tiny_tokenizer()
    batches = encoder_batches(tokenizer, ["a", "a much longer text than the other one " * 3], 64, 2)
    assert len(batches) == 1 and batches[0].attention_mask.sum(1).unique().numel() == 2
