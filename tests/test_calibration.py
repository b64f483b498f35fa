"""Calibration text as batches: documents joined, padded, masked."""

import torch

from pilon_compress.convert.calibration import causal_batches, encoder_batches


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
