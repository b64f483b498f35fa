"""A file that is not as it was written is named, whichever byte was hit; what people may edit is not looked at."""

import json

import pytest

from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.checksum import damage
from pilon_compress.io.folders import fresh_folder
from pilon_compress.io.manifest import read_json, verify_folder, write_json

FILES = ("config.json", "model.safetensors", "tokenizer.json", "2_Dense/model.safetensors", "README.md")


@pytest.fixture
def model(tmp_path):
    with fresh_folder(tmp_path / "model") as work:
        for name in FILES:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(name.encode() * 9)
    return tmp_path / "model"


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_folder_passes_and_so_does_one_without_a_manifest(model):
    verify_folder(model)
    (model / "manifest.json").unlink()
    flip(model / "model.safetensors", 3)
    assert verify_folder(model) is None


@pytest.mark.parametrize("name", FILES[:4])
@pytest.mark.parametrize("place", [0, 17, -1])
def test_a_flipped_bit_is_refused_and_the_file_named(model, name, place):
    verify_folder(model)  # the checksums that are remembered must not hide what happens next
    flip(model / name, place)
    with pytest.raises(BadInput, match=name) as caught:
        verify_folder(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5])
def test_a_cut_or_missing_file_is_refused(model, size):
    path = model / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadInput, match="tokenizer.json has"):
        verify_folder(model, weights=False)
    path.unlink()
    with pytest.raises(BadInput, match="tokenizer.json is missing"):
        verify_folder(model, weights=False)


def test_weights_are_left_out_where_they_are_not_read_and_pages_always(model):
    flip(model / "model.safetensors", 0)
    flip(model / "README.md", 0)
    verify_folder(model, weights=False)
    with pytest.raises(BadInput, match="model.safetensors"):
        verify_folder(model)


def test_a_damaged_manifest_is_one_line(model):
    path = model / "manifest.json"
    plain = json.loads(path.read_text())
    texts = [
        "",
        "[]",
        "3",
        "{}",
        '{"files": 3}',
        '{"files": {"a": {}}}',
        '{"files": {"/etc/passwd": {}}}',
        "[" * 100_000,
    ]
    texts += [json.dumps({"files": {"../x": entry}}) for entry in plain["files"].values()]
    for text in texts:
        path.write_text(text)
        with pytest.raises(BadInput, match="manifest.json is damaged") as caught:
            verify_folder(model)
        assert "\n" not in str(caught.value)


def test_every_flip_of_a_manifest_is_refused(model):
    path = model / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole)
        flip(path, place)
        same = json.loads(whole) == _parsed(path)
        assert same or damage(model) is not None or _only_ours(path, whole), place


def _parsed(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _only_ours(path, whole):
    """The flip hit what says nothing about files."""
    found = _parsed(path)
    return found is not None and found.get("files") == json.loads(whole)["files"]


def test_refresh_describes_what_was_changed_on_purpose(model):
    (model / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="config.json"):
        verify_folder(model)
    manifest.refresh(model)
    assert verify_folder(model) is None


def test_json_with_a_checksum_is_read_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) is None
    write_json(path, {"x": [0.1 + 0.2, None, "é"]})
    assert read_json(path) == {"x": [0.1 + 0.2, None, "é"]}
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole)
        flip(path, place, 1)
        assert read_json(path) in (None, {"x": [0.1 + 0.2, None, "é"]}), place
