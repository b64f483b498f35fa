"""Calibration text as batches: documents joined, padded, masked."""

from hashlib import sha256

import torch

from pilon_compress.config import conversion
from pilon_compress.convert.prepare import prepare
from pilon_compress.data.calibration import causal_batches, encoder_batches
from pilon_compress.data.sequences import windows


def test_windows_join_documents_by_eos(tiny):
    tokenizer = tiny.tiny_tokenizer()
    documents = ["one two three", "four five", "six seven eight nine ten"]
    batches = causal_batches(list(windows(tokenizer, documents, length=4)), batch_size=2)
    flat = torch.cat([b.input_ids.reshape(-1) for b in batches]).tolist()
    expected = []
    for document in documents:
        expected += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert flat == expected[: len(flat)] and len(expected) - len(flat) < 4
    assert {b.input_ids.shape[1] for b in batches} == {4} and {len(b.input_ids) for b in batches[:-1]} == {2}


def test_encoder_batches_pad_and_mask(tiny):
    tokenizer = tiny.tiny_tokenizer()
    batches = encoder_batches(tokenizer, ["a", "a much longer text than the other one " * 3], 64, 2)
    assert len(batches) == 1 and batches[0].attention_mask.sum(1).unique().numel() == 2


def test_blocks_of_a_language_model_are_drawn_by_the_seed(tiny, tmp_path):
    tiny.save_tiny("gpt2", tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(sha256(bytes([i])).hexdigest() for i in range(256)))
    asked = {"data": str(tmp_path / "text.txt"), "samples": 8, "sequence_length": 16, "batch_size": 4}

    def drawn(**seed):
        job = prepare(conversion.build({"model": str(tmp_path / "model"), "calibration": asked, **seed}))
        return torch.cat([batch.input_ids for batch in job.read_calibration(tiny.tiny_tokenizer())])

    one, again, other = drawn(seed=1), drawn(seed=1), drawn(seed=2)
    assert one.shape == (8, 16) and torch.equal(one, again)
    assert len({tuple(row) for row in torch.cat([one, other]).tolist()}) > 12, "two draws have little in common"
