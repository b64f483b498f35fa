"""Tensors come back from a tensor store as they were, from memory and from disk."""

import pytest
import torch

from pilon_compress.io.tensor_store import TensorStore


def test_beyond_the_limit_tensors_become_files_and_come_back_equal(tmp_path):
    store, tensors = TensorStore(tmp_path / "store", 1000), {f"a/{i}": torch.randn(10, 10).T for i in range(4)}
    for name, tensor in tensors.items():
        store.put(name, tensor)
    assert len(list((tmp_path / "store").iterdir())) == 2 and store.held == 800
    assert all(name in store and torch.equal(store.get(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(store.take("a/3"), tensors["a/3"]) and "a/3" not in store
    store.drop("a/0")
    assert store.held == 400 and len(list((tmp_path / "store").iterdir())) == 1
    store.clear()
    assert not (tmp_path / "store").exists() and store.names() == []


def test_without_a_folder_everything_stays_in_memory():
    store, tensor = TensorStore(), torch.randn(1000)
    store.put("a", tensor)
    assert store.get("a") is tensor
    with pytest.raises(KeyError):
        store.get("b")


def test_a_second_store_adopts_the_files_of_the_first(tmp_path):
    tensor = torch.randn(3, 5, dtype=torch.float64)
    TensorStore(tmp_path).put("a", tensor)
    store = TensorStore(tmp_path)
    store.adopt(["a"], torch.device("cpu"))
    assert torch.equal(store.get("a"), tensor) and store.get("a").data_ptr() % 64 == 0
    with pytest.raises(KeyError):
        store.adopt(["b"], torch.device("cpu"))
