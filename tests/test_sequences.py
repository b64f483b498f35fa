"""Check that every command begins its sequences like the tokenizer: BOS where it puts one, EOS between documents."""

import json

import numpy as np
import pytest
import torch
from tokenizers import processors

from pilon_compress.data import sequences
from pilon_compress.data.block_dataset import BlockDataset
from pilon_compress.data.streaming import StreamingBlocks
from pilon_compress.data.token_files import tokenise
from pilon_compress.errors import BadInput

BOS, EOS = 1, 2


def begun_by(tokenizer, *words):
    """The tokenizer with these special tokens put before every text."""
    ids = tokenizer.convert_tokens_to_ids(list(words))
    template = " ".join([*words, "$A"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        template, None, list(zip(words, ids, strict=True))
    )
    return tokenizer


@pytest.mark.parametrize("words", [(), ("<bos>",), ("<cls>",), ("<cls>", "<bos>")])
def test_windows_begin_as_the_tokenizer_begins_a_text(tiny, words):
    tokenizer = begun_by(tiny.tiny_tokenizer(), *words)
    front = tokenizer.convert_tokens_to_ids(list(words))
    assert sequences.prefix(tokenizer) == front
    assert sequences.begins_with(tokenizer) == ("".join(words) or None)
    found = list(sequences.windows(tokenizer, ["abcdef", "ghij"], 5))
    plain = [*tokenizer("abcdef", add_special_tokens=False).input_ids, EOS]
    plain += tokenizer("ghij", add_special_tokens=False).input_ids
    assert all(window[: len(front)] == front and len(window) == 5 for window in found)
    assert [token for window in found for token in window[len(front) :]] == plain[: len(found) * (5 - len(front))]


def test_what_stands_behind_a_text_is_not_taken_for_its_beginning(tiny):
    tokenizer = tiny.tiny_tokenizer(ends=True)  # <cls> before, <sep> behind
    assert sequences.prefix(tokenizer) == [3]


def test_a_beginning_that_the_text_spells_out_is_not_doubled(tiny):
    tokenizer = begun_by(tiny.tiny_tokenizer(), "<bos>")
    (window,) = sequences.windows(tokenizer, ["<bos>abc"], 4)
    assert window == [BOS, *tokenizer("abc", add_special_tokens=False).input_ids]


def test_windows_too_short_for_a_token_are_refused(tiny):
    with pytest.raises(BadInput, match="at least 2"):
        list(sequences.windows(begun_by(tiny.tiny_tokenizer(), "<bos>"), ["abc"], 1))


def test_ids_beyond_the_embedding_are_named(tiny):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["quick", "lazy"])
    largest = max(tokenizer("a quick one").input_ids)
    with pytest.raises(BadInput, match=f"id {largest} .'quick'.*{largest} rows"):
        sequences.check_ids(tokenizer, largest, largest)
    sequences.check_ids(tokenizer, largest, largest + 1)


def corpus(tmp_path):
    documents = [f"{i}:" + "x" * (i * 13 % 71) for i in range(30)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in documents))
    return str(tmp_path / "t.jsonl"), documents


@pytest.mark.parametrize("respect", [False, True])
def test_training_rows_begin_with_bos_and_predict_every_token_once(tiny, tmp_path, respect):
    tokenizer = begun_by(tiny.tiny_tokenizer(), "<bos>")
    source, _ = corpus(tmp_path)
    file = tokenise(source, tokenizer, "all", tmp_path / "cache")
    blocks = BlockDataset(file, 16, respect)
    batch = blocks.batch(range(len(blocks)))
    assert (batch.input_ids[:, 0] == BOS).all()
    predicted = batch.labels[batch.labels != -100].tolist()
    expected = np.asarray(file.ids)[1:].tolist()
    if respect:  # no document is predicted from the one before it
        expected = [token for place, token in enumerate(expected, 1) if place not in set(file.starts.tolist())]
    assert predicted == expected
    doubled = (batch.input_ids[:, :-1] == BOS) & (batch.input_ids[:, 1:] == BOS)
    assert not doubled.any()


def test_streamed_rows_are_begun_like_stored_ones(tiny, tmp_path):
    tokenizer = begun_by(tiny.tiny_tokenizer(), "<bos>")
    source, documents = corpus(tmp_path)
    stored = BlockDataset(tokenise(source, tokenizer, "all", tmp_path / "cache"), 16)
    streamed = StreamingBlocks(source, tokenizer, 16, 0, "all", shuffle=1).batch(len(stored))
    assert torch.equal(streamed.input_ids, stored.batch(range(len(stored))).input_ids)
    assert torch.equal(streamed.labels, stored.batch(range(len(stored))).labels)
    assert documents


def test_without_bos_training_rows_are_plain_stretches(tiny, tmp_path):
    source, _ = corpus(tmp_path)
    file = tokenise(source, tiny.tiny_tokenizer(), "all", tmp_path / "cache")
    rows = BlockDataset(file, 16).batch(range(3))
    assert rows.input_ids.flatten().tolist() == np.asarray(file.ids)[:48].tolist()
