"""Streamed text: every document once per epoch on one rank, and a run that goes on exactly where it stopped."""

import io
import json

import pytest
import torch

from pilon_compress.data.batch import IGNORED
from pilon_compress.data.block_dataset import BlockDataset
from pilon_compress.data.streaming import StreamingBlocks
from pilon_compress.data.token_files import tokenise
from pilon_compress.errors import BadInput

DOCUMENTS = [f"{i}:" + "x" * (i * 13 % 71) for i in range(40)]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "t.txt", DOCUMENTS)


def write(path, documents):
    rows = "\n".join(json.dumps({"text": document}) for document in documents)
    path.write_text("\n\n".join(documents) if path.suffix == ".txt" else rows, "utf-8")
    return str(path)


def pairs(batch):
    """Return pairs of tokens and the tokens that they predict, as comparable values."""
    rows = zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)
    return [(tuple(ids), tuple(labels)) for ids, labels in rows]


def blocks_of(source, tokenizer, folder, **options):
    """The blocks of the same documents as a token file, in its order."""
    blocks = BlockDataset(tokenise(source, tokenizer, "all", folder), 16, **options)
    return blocks.batch(range(len(blocks)))


def same(a, b):
    return all(torch.equal(value, getattr(b, name)) for name, value in vars(a).items() if value is not None)


@pytest.mark.parametrize("respect", [False, True])
@pytest.mark.parametrize("shuffle", [1, 8, 1000])
def test_each_epoch_holds_the_blocks_of_the_token_file_once(source, tiny, tmp_path, shuffle, respect):
    tokenizer = tiny.tiny_tokenizer()
    expected = blocks_of(source, tokenizer, tmp_path, respect_documents=respect)
    stream = StreamingBlocks(source, tokenizer, 16, 0, "all", shuffle=shuffle, respect_documents=respect)
    epochs = [stream.batch(len(expected.input_ids)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(pairs(epoch)) == sorted(pairs(expected))
    if shuffle == 1:
        assert same(epochs[0], expected), "documents and positions too"
    else:
        assert pairs(epochs[0]) != pairs(expected) and pairs(epochs[0]) != pairs(epochs[1])
    assert (epochs[0].document is None) != respect


def test_the_seed_decides_the_order(source, tiny):
    first, again, other = (
        pairs(StreamingBlocks(source, tiny.tiny_tokenizer(), 16, seed, "all").batch(20)) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_every_document_goes_to_exactly_one_rank(source, tiny, tmp_path, world):
    tokenizer = tiny.tiny_tokenizer()
    for rank in range(world):
        mine = write(tmp_path / f"{world}-{rank}.txt", DOCUMENTS[rank::world])
        expected = pairs(blocks_of(mine, tokenizer, tmp_path))
        stream = StreamingBlocks(source, tokenizer, 16, 0, "all", rank, world, shuffle=7)
        assert sorted(pairs(stream.batch(len(expected)))) == sorted(expected)
        assert sorted(pairs(stream.batch(len(expected)))) == sorted(expected), "ranks need not have the same number"


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("stop", [0, 1, 9, 40, 41, 100])
def test_a_run_goes_on_exactly(source, tiny, stop, world):
    """Stopped at the start, inside documents, near the end of an epoch and behind it, through a file."""

    def stream():
        return StreamingBlocks(
            source, tiny.tiny_tokenizer(), 16, 3, "train", world - 1, world, shuffle=6, respect_documents=True
        )

    run = stream()
    for _ in range(stop):
        run.batch(2)
    kept = io.BytesIO()
    torch.save(run.state_dict(), kept)
    expected = [run.batch(2) for _ in range(60)]
    kept.seek(0)
    resumed = stream()
    resumed.batch(3)
    resumed.load_state_dict(torch.load(kept, weights_only=True))
    assert all(same(a, resumed.batch(2)) for a in expected)


def test_a_document_is_not_tokenised_again_after_it_was_read(source, tiny, monkeypatch):
    tokenizer = tiny.tiny_tokenizer()
    run = StreamingBlocks(source, tokenizer, 16, 0, "all", shuffle=4)
    run.batch(40)
    state = run.state_dict()
    seen = []
    from pilon_compress.data import sequences

    real = sequences.encode
    monkeypatch.setattr(sequences, "encode", lambda t, documents: real(t, (seen.append(d) or d for d in documents)))
    resumed = StreamingBlocks(source, tokenizer, 16, 0, "all", shuffle=4)
    resumed.load_state_dict(state)
    resumed.batch(10)
    assert seen == DOCUMENTS[state["read"] :] and 0 < state["read"] < 40


def test_documents_that_the_tokenizer_does_not_know_do_not_shift_the_count(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2, "c": 3}, []))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    source = write(tmp_path / "t.txt", ["zzz", "aaa", "zz", "bbb", "z", "ccc"])
    run = StreamingBlocks(source, tokenizer, 3, 0, "all", shuffle=1)
    assert run.batch(1).input_ids.tolist() == [[1, 1, 1]]
    resumed = StreamingBlocks(source, tokenizer, 3, 0, "all", shuffle=1)
    resumed.load_state_dict(run.state_dict())
    assert same(run.batch(4), resumed.batch(4))
    assert tokenise(source, tokenizer, "all", tmp_path).about.documents == 3


def test_train_and_validation_are_disjoint(source, tiny):
    tokenizer = tiny.tiny_tokenizer()
    seen = {}
    for part in ("train", "validation"):
        batch = StreamingBlocks(source, tokenizer, 100, 0, part, shuffle=1).batch(30)
        text = tokenizer.decode(torch.where(batch.labels == IGNORED, 0, batch.labels).flatten())
        seen[part] = {document for document in DOCUMENTS if f"<eos>{document}<eos>" in text}
    assert seen["train"] and seen["validation"] and not seen["train"] & seen["validation"]


def test_a_hub_dataset_is_streamed_and_resumed(hub, tiny, tmp_path):
    folder = hub.root / "datasets" / "some" / "prose"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", DOCUMENTS)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    code = """
import sys
import torch
from transformers import AutoTokenizer
from pilon_compress.data.streaming import StreamingBlocks
def stream():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    return StreamingBlocks("hub:some/prose::train:text", tokenizer, 16, 0, "all", shuffle=9)
run, resumed = stream(), stream()
run.batch(11)
resumed.load_state_dict(run.state_dict())
print(torch.equal(run.batch(60).labels, resumed.batch(60).labels))
"""
    assert hub.run("-c", code, str(tmp_path)).stdout == "True\n"


def test_what_cannot_be_streamed_is_said_in_one_line(source, tiny, tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    with pytest.raises(BadInput, match="eos_token"):
        StreamingBlocks(source, tiny.tiny_tokenizer(eos=False), 16, 0)
    with pytest.raises(BadInput, match="nowhere.txt"):
        StreamingBlocks(str(tmp_path / "nowhere.txt"), tokenizer, 16, 0)
    few = write(tmp_path / "few.txt", DOCUMENTS[:2])
    with pytest.raises(BadInput, match="few.txt holds no text for rank 2 of 3"):
        StreamingBlocks(few, tokenizer, 16, 0, "all", 2, 3).batch(1)
    state = StreamingBlocks(source, tokenizer, 16, 0, "all", 0, 2).state_dict()
    with pytest.raises(BadInput, match="world was 2 and is 3"):
        StreamingBlocks(source, tokenizer, 16, 0, "all", 0, 3).load_state_dict(state)
    write(tmp_path / "t.txt", [*DOCUMENTS, "one more"])
    with pytest.raises(BadInput, match="t.txt has changed") as error:
        StreamingBlocks(source, tokenizer, 16, 0, "all", 0, 2).load_state_dict(state)
    assert "\n" not in str(error.value)
