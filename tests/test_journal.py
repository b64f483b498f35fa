"""The journal gives back whole results of the same conversion and nothing else."""

import pytest
import torch

from pilon_compress.io.journal import Journal


@pytest.fixture
def kept(tmp_path):
    """(output, tensors): a journal that holds `tensors` as `one`, and plain data as `two`."""
    journal, tensors = Journal(tmp_path / "out", "mark"), {"a": torch.randn(7, 3).T, "b": torch.arange(3)}
    journal.put("one", tensors)
    journal.put_plain("two", {"x": [1, "é"]})
    return tmp_path / "out", tensors


def test_a_second_run_finds_what_the_first_put(kept):
    output, tensors = kept
    again = Journal(output, "mark")
    found = again.get("one")
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert again.get_plain("two") == {"x": [1, "é"]} and again.get("three") is None


def test_a_changed_fingerprint_drops_everything(kept):
    assert Journal(kept[0], "other").get("one") is None
    assert Journal(kept[0], "mark").get("one") is None, "and not only from sight"


@pytest.mark.parametrize("size", [0, 5, -1])
def test_a_truncated_file_counts_as_missing(kept, size):
    path = kept[0].parent / ".out.partial" / "one.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert Journal(kept[0], "mark").get("one") is None


def test_remove_leaves_nothing(kept):
    Journal(kept[0], "mark").remove()
    assert list(kept[0].parent.iterdir()) == []


def test_without_an_output_nothing_is_kept():
    journal = Journal()
    journal.put("one", {"a": torch.ones(1)})
    assert journal.get("one") is None
