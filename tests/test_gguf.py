"""GGUF files are models like any other: read by transformers, converted, evaluated, refused in one line."""

import hashlib
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pilon_compress.config import conversion
from pilon_compress.convert.pipeline import convert
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.evaluate import evaluate
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.models import checkpoint, gguf, references

TEXT = "\n\n".join(f"Paragraph {i}: about bananas and cabbages, number {i * i % 97}." for i in range(120))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder whose `cache` holds what was read, for all tests: reading takes a process of its own."""
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(autouse=True)
def cache(home, monkeypatch):
    monkeypatch.setenv("PILON_CACHE", str(home / "cache"))
    return home / "cache" / "gguf"


@pytest.fixture(scope="module")
def file(tiny, home):
    tiny.save_gguf(home / "tiny.gguf", bos=True)
    return home / "tiny.gguf"


def test_the_weights_are_those_that_transformers_reads(file, cache):
    ids = torch.tensor([[1, *range(10, 30)]])
    plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file="tiny.gguf", dtype=torch.float32)
    ours = checkpoint.load_model(str(file), dtype="float32")
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file="tiny.gguf")
    mine = checkpoint.load_tokenizer(str(file))
    assert mine("about cabs")["input_ids"] == words("about cabs")["input_ids"]
    assert checkpoint.load_config(str(file)).dtype == torch.bfloat16
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [gguf._key([file])]


def test_sixteen_bit_files_keep_their_type_and_changed_files_are_read_again(tiny, tmp_path):
    path = tmp_path / "half.gguf"
    tiny.save_gguf(path, kind="F16")
    assert checkpoint.load_config(str(path)).dtype == torch.float16
    before = gguf.dense_folder([path], "half.gguf")
    assert gguf.dense_folder([path], "half.gguf") == before
    whole = (before / "model.safetensors").read_bytes()
    (before / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert gguf.dense_folder([path], "half.gguf") == before, "a damaged folder is made again"
    assert (before / "model.safetensors").read_bytes() == whole
    path.unlink()
    tiny.save_gguf(path, kind="F16", seed=1)
    assert gguf._key([path]) != before.name


def test_parts_in_packages_are_joined_in_order_and_checked(file, tmp_path, monkeypatch):
    data = file.read_bytes()
    third = len(data) // 3
    pieces = [data[:third], data[third : 2 * third], data[2 * third :]]
    (tmp_path / "shipped_gguf").mkdir()
    (tmp_path / "shipped_gguf" / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    (tmp_path / "shipped_gguf" / "SHA256SUMS").write_text(f"{hashlib.sha256(data).hexdigest()}  whole.gguf\n")
    for number, piece in enumerate(pieces):
        folder = tmp_path / f"shipped_gguf_part{number + 1}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("")
        (folder / f"whole.gguf.part{number:02}").write_bytes(piece)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = references.resolve("package:shipped-gguf")
    whole = checkpoint.load_model(str(file), dtype="float32").state_dict()
    joined = checkpoint.load_model(named, dtype="float32").state_dict()
    assert all(torch.equal(whole[name], joined[name]) for name in whole)
    last = tmp_path / "shipped_gguf_part3" / "data" / "whole.gguf.part02"
    last.write_bytes(pieces[2][:-1] + bytes([pieces[2][-1] ^ 1]))
    with pytest.raises(BadInput, match="checksum"):
        references.resolve("package:shipped_gguf")


@pytest.mark.parametrize("damage", ["empty", "other", "cut", "split"])
def test_files_that_cannot_be_read_are_refused_in_one_line(tiny, tmp_path, cache, damage):
    path = tmp_path / "m.gguf"
    tiny.save_gguf(path, split=2 if damage == "split" else 0)
    data = path.read_bytes()
    if damage != "split":
        content = {"empty": b"", "other": b"PK\x03\x04" * 100, "cut": data[:-5000]}
        path.write_bytes(content[damage])
    with pytest.raises(BadInput) as refused:
        references.resolve(str(path))
    assert "m.gguf" in str(refused.value) and "\n" not in str(refused.value)
    assert not any(one.name.startswith("m-") for one in cache.iterdir()), "nothing half-read is kept"


def test_a_gguf_is_inspected_converted_and_evaluated(file, tmp_path, monkeypatch):
    shutil.copy2(file, tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert anatomy("tiny.gguf").dump()["architecture"] == "LlamaForCausalLM"
    calibration = {"data": "text.txt", "samples": 8, "sequence_length": 32, "batch_size": 4}
    asked = {"model": "tiny.gguf", "calibration": calibration, "budget": {"ffn_ratio": 0.7}}
    report = convert(conversion.build(asked), "out").dump()
    assert report["calibration"]["begins_with"] == report["evaluation"]["begins_with"] == "<bos>"
    assert "begins_with: <bos>" in (tmp_path / "out" / "recipe.yaml").read_text()
    found = evaluate("out", settings=conversion.Evaluation(window=32)).dump()
    assert found["against"] == "tiny.gguf" and found["data"].startswith("text.txt")
    assert found["begins_with"] == "<bos>" and found["perplexity_ratio"] > 0
    asked["calibration"] |= {"begins_with": "<cls>"}
    with pytest.raises(BadInput, match="begins_with is '<cls>'"):
        convert(conversion.build(asked), "other")
