"""Training batches: every token predicted once, the same run whatever the number of ranks, documents kept apart."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from pilon_compress.data.batch import IGNORED, Batch
from pilon_compress.data.block_dataset import BlockDataset
from pilon_compress.data.loader import Loader, in_order, permuted
from pilon_compress.data.token_files import tokenise
from pilon_compress.nn.functional import mean_pooled

DOCUMENTS = [f"{i}:" + "x" * (i * 5 % 31) for i in range(40)]
FAMILIES = ("llama", "arcee", "gpt2", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox")


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in DOCUMENTS))
    return tokenise(str(folder / "t.jsonl"), tiny.tiny_tokenizer(), "all", folder)


def rows_of(batch):
    """Rows that hold labels, as comparable values."""
    pairs = zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)
    return [(tuple(ids), tuple(labels)) for ids, labels in pairs if set(labels) != {IGNORED}]


def shares(loader, step, world):
    return [
        row
        for rank in range(world)
        for micro in range(loader.micro_batches)
        for row in rows_of(loader.batch(step, micro, rank, world))
    ]


@pytest.mark.parametrize("length", [1, 7, 16, 10_000])
def test_every_token_but_the_first_is_predicted_once_from_the_one_before(file, length):
    blocks = BlockDataset(file, length)
    batch = blocks.batch(range(len(blocks)))
    scored = batch.labels != IGNORED
    assert batch.labels[scored].tolist() == file.ids[1:].tolist()
    assert batch.input_ids[scored].tolist() == file.ids[:-1].tolist()
    assert batch.scored == len(file) - 1 and batch.input_ids.shape == (len(blocks), length)
    assert batch.document is None and "position_ids" not in batch.inputs()
    assert not scored[:-1].logical_not().any(), "only the last block is padded"


@pytest.mark.parametrize("length", [1, 7, 16, 10_000])
def test_respected_documents_have_their_own_positions_and_predict_nothing_beyond(file, length):
    blocks = BlockDataset(file, length, respect_documents=True)
    batch = blocks.batch(range(len(blocks)))
    starts = set(file.starts.tolist())
    scored = batch.labels != IGNORED
    assert batch.labels[scored].tolist() == [int(t) for i, t in enumerate(file.ids) if i and i not in starts]
    for row in range(len(blocks)):
        position, document = 0, 0
        for column in range(min(length, len(file) - row * length)):
            if column and row * length + column in starts:
                position, document = 0, document + 1
            assert batch.position_ids[row, column] == position and batch.document[row, column] == document
            position += 1


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_a_permutation_holds_every_index_once_and_changes_with_seed_and_epoch(count):
    def order(seed, epoch):
        return permuted(np.arange(count), count, seed, epoch).tolist()

    assert sorted(order(0, 0)) == list(range(count))
    assert order(0, 0) == [int(permuted(np.array([place]), count, 0, 0)[0]) for place in range(count)]
    if count > 3:
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_permutations_look_random():
    """Check that in 1000 permutations of 20, each index falls on each place about 50 times."""
    orders = np.array([permuted(np.arange(20), 20, seed, 3) for seed in range(1000)])
    counts = np.array([np.bincount(column, minlength=20) for column in orders.T])
    assert counts.min() > 20 and counts.max() < 85
    one = permuted(np.arange(1000), 1000, 0, 0)
    assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.1 and (abs(np.diff(one)) < 3).mean() < 0.02


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_block_is_seen_once_per_epoch_and_epochs_differ(file, batch_size):
    blocks = BlockDataset(file, 16)
    loader = Loader(blocks, batch_size, seed=5)
    steps = -(-3 * len(blocks) // batch_size)
    stream = [index for step in range(steps) for index in loader.indices(step)]
    epochs = [stream[i * len(blocks) : (i + 1) * len(blocks)] for i in range(3)]
    assert all(sorted(epoch) == list(range(len(blocks))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.epoch(steps) >= 3 > loader.epoch(steps - 1)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("batch_size", "micro_batches"), [(1, 1), (7, 1), (8, 2), (5, 3)])
def test_ranks_and_micro_batches_share_the_same_rows(file, world, batch_size, micro_batches):
    blocks = BlockDataset(file, 16)
    loader = Loader(blocks, batch_size, 0, micro_batches)
    for step in range(2 * len(blocks) // batch_size):
        expected = [row for index in loader.indices(step) for row in rows_of(blocks.batch([index]))]
        assert sorted(shares(loader, step, world)) == sorted(expected)
        sizes = [
            len(loader.batch(step, micro, rank, world).input_ids)
            for rank in range(world)
            for micro in range(micro_batches)
        ]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1, "every rank takes part, with as much as the others"
        assert loader.scored(step) == sum(label != IGNORED for _, labels in expected for label in labels)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_validation_sees_every_block_once_in_order(file, world):
    blocks = BlockDataset(file, 16)
    ranks = [list(in_order(blocks, 7, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-len(blocks) // 7)}
    seen = [row for batches in zip(*ranks, strict=True) for batch in batches for row in rows_of(batch)]
    assert seen == rows_of(blocks.batch(range(len(blocks))))


def test_a_run_goes_on_exactly_from_its_step(file):
    """Stopped in the middle of an epoch and behind one: a fresh loader gives what the first would have given."""
    blocks = BlockDataset(file, 16, respect_documents=True)
    run = Loader(blocks, 4, seed=9)
    whole = [run.batch(step) for step in range(3 * len(blocks) // 4)]
    for stop in (1, len(blocks) // 8, len(blocks) // 4 + 1, len(whole) - 1):
        resumed = Loader(BlockDataset(file, 16, respect_documents=True), 4, seed=9)
        for step in range(stop, len(whole)):
            for name in ("input_ids", "labels", "position_ids", "document"):
                assert torch.equal(getattr(resumed.batch(step), name), getattr(whole[step], name))
    assert rows_of(Loader(blocks, 4, seed=10).batch(0)) != rows_of(whole[0])


def test_a_batch_moves_whole(file):
    batch = BlockDataset(file, 16).batch([0, 1]).to("meta")
    assert batch.labels.device.type == batch.input_ids.device.type == "meta" and batch.document is None


def attention_mask(batch: Batch) -> torch.Tensor:
    """The additive mask (B, 1, T, T) that `Batch.inputs` stands for: causal, and closed between documents."""
    allowed = torch.ones(*2 * batch.input_ids.shape[1:], dtype=torch.bool).tril()
    allowed = allowed & (batch.document[:, :, None] == batch.document[:, None, :])
    return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", (*FAMILIES, "opt"))
def test_a_document_does_not_depend_on_those_packed_before_it(tiny, file, family, attention):
    """Through `inputs` alone, and through the mask; OPT through the mask only, as `Batch.inputs` says."""
    model = tiny.tiny_model(family, attn_implementation=attention)
    batch = BlockDataset(file, 64, respect_documents=True).batch([0, 2])
    alone = torch.zeros(*batch.input_ids.shape, model.config.vocab_size)
    masked = {**batch.inputs(), "attention_mask": attention_mask(batch)}
    with torch.no_grad():
        for row in range(2):
            for document in batch.document[row].unique():
                at = batch.document[row] == document
                alone[row, at] = model(batch.input_ids[row, at][None]).logits[0]
        assert torch.allclose(model(**masked).logits, alone, atol=1e-5)
        plain = torch.allclose(model(**batch.inputs()).logits, alone, atol=1e-5)
    assert plain == (family != "opt")


def test_labels_are_what_the_model_of_transformers_scores(tiny, file):
    """The loss of aligned labels is the model's own, which shifts."""
    model = tiny.tiny_model("llama")
    batch = BlockDataset(file, 32).batch([3])
    whole = torch.cat([batch.input_ids, batch.labels[:, -1:]], 1)
    with torch.no_grad():
        logits = model(**batch.inputs()).logits
        theirs = model(whole, labels=whole).loss
    assert torch.allclose(cross_entropy(logits[0], batch.labels[0]), theirs, atol=1e-5)


def test_rows_of_a_batch_are_cut_in_every_field(file):
    whole = BlockDataset(file, 12, respect_documents=True).batch([0, 1, 2])
    part = whole.rows(slice(1, 3))
    for name in ("input_ids", "labels", "position_ids", "document"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[1:3])
    assert part.attention_mask is None and part.mask.all() and part.mask.shape == (2, 12)


def test_mean_pooling_leaves_padding_out():
    states = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    pooled = mean_pooled(states, mask)
    assert torch.allclose(pooled[0], states[0].mean(0)) and torch.allclose(pooled[1], states[1, :2].mean(0))
    assert torch.equal(mean_pooled(states, mask.bool()), pooled)
