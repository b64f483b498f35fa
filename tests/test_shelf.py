"""Tensors come back from a shelf as they were, from memory and from disk."""

import pytest
import torch

from pilon_compress.io.offload import Shelf


def test_beyond_the_limit_tensors_become_files_and_come_back_equal(tmp_path):
    shelf, tensors = Shelf(tmp_path / "shelf", 1000), {f"a/{i}": torch.randn(10, 10).T for i in range(4)}
    for name, tensor in tensors.items():
        shelf.put(name, tensor)
    assert len(list((tmp_path / "shelf").iterdir())) == 2 and shelf.held == 800
    assert all(name in shelf and torch.equal(shelf.get(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(shelf.take("a/3"), tensors["a/3"]) and "a/3" not in shelf
    shelf.drop("a/0")
    assert shelf.held == 400 and len(list((tmp_path / "shelf").iterdir())) == 1
    shelf.clear()
    assert not (tmp_path / "shelf").exists() and shelf.names() == []


def test_without_a_folder_everything_stays_in_memory():
    shelf, tensor = Shelf(), torch.randn(1000)
    shelf.put("a", tensor)
    assert shelf.get("a") is tensor
    with pytest.raises(KeyError):
        shelf.get("b")


def test_a_second_shelf_adopts_the_files_of_the_first(tmp_path):
    tensor = torch.randn(3, 5, dtype=torch.float64)
    Shelf(tmp_path).put("a", tensor)
    shelf = Shelf(tmp_path)
    shelf.adopt(["a"], torch.device("cpu"))
    assert torch.equal(shelf.get("a"), tensor) and shelf.get("a").data_ptr() % 64 == 0
    with pytest.raises(KeyError):
        shelf.adopt(["b"], torch.device("cpu"))
