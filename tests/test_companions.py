"""Check that companions are copied completely, from a folder and from the hub, and never from or to the outside."""

import json

import pytest

from pilon_compress.errors import BadInput
from pilon_compress.io import companions

EVERY = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "tokenizer.model",
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "configuration_my.py",
    "modeling_my.py",
    "tokenization_my.py",
    "helpers.py",
)
OTHER = ("model.safetensors", "pytorch_model.bin", "README.md", "train.py", "onnx/model.onnx", "optimizer.pt", ".git/x")


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for name in (*EVERY, *OTHER):
        write(folder, name, f"{name}\n" if not name.endswith(".json") else "{}")
    write(folder, "modules.json", json.dumps([{"path": path} for path in ("", "1_Pooling", "2_Dense", "3_Normalize")]))
    auto_map = {"AutoConfig": "configuration_my.Mine", "AutoModel": "modeling_my.Mine", "AutoX": "other/repo--far.Away"}
    write(folder, "config.json", json.dumps({"auto_map": auto_map}))
    write(folder, "tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_my.Slow", None]}}))
    write(folder, "modeling_my.py", "from .helpers import one\nraise SystemExit('never executed')\n")
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_of_them_come_from_a_folder_and_nothing_else(source, tmp_path):
    (tmp_path / "out").mkdir()
    companions.copy(companions.find(str(source)), tmp_path / "out")
    assert files(tmp_path / "out") == set(EVERY)
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_text() == "2_Dense/model.safetensors\n"


def test_and_from_the_hub(source, hub, tmp_path):
    source.rename(hub.root.joinpath("owner").mkdir(parents=True) or hub.root / "owner" / "name")
    script = "import sys; from pathlib import Path; from pilon_compress.io import companions\n"
    script += "companions.copy(companions.find('owner/name'), Path(sys.argv[1]))"
    (tmp_path / "out").mkdir()
    hub.run("-c", script, str(tmp_path / "out"))
    assert files(tmp_path / "out") == set(EVERY)


def test_files_that_were_written_already_stay(source, tmp_path):
    write(tmp_path / "out", "generation_config.json", "ours")
    companions.copy(companions.find(str(source)), tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == "ours"


@pytest.mark.parametrize(
    "text",
    ["{", "3", "null", "{}", "[3]", '[{"x": 1}]', '[{"path": 5}]', "[" * 100_000, "\udcff"]
    + [json.dumps([{"path": path}]) for path in ("../x", "/etc", "a/../../x", "a\\..\\x", "C:/x", "..", "a\0b")],
    ids=range(16),
)
def test_modules_that_are_none_or_lead_outside_are_one_line(source, text):
    (source / "modules.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput, match="modules.json") as caught:
        companions.find(str(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["4_Link", "2_Dense/model.safetensors"])
def test_a_module_behind_a_link_that_leads_outside_is_refused(source, tmp_path, name):
    write(tmp_path, "secret/model.safetensors", "secret")
    write(source, "modules.json", json.dumps([{"path": name.partition("/")[0]}]))
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret" / ("model.safetensors" if "/" in name else ""))
    with pytest.raises(BadInput, match="leads out"):
        companions.find(str(source))


def test_a_licence_behind_such_a_link_is_left_with_a_line(source, tmp_path, said):
    write(tmp_path, "secret.txt", "secret")
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to(tmp_path / "secret.txt")
    assert "LICENSE" not in companions.find(str(source))
    assert len(said()) == 1


def test_pickled_module_weights_are_left_with_a_line(source, said):
    (source / "2_Dense" / "model.safetensors").rename(source / "2_Dense" / "pytorch_model.bin")
    assert "2_Dense/pytorch_model.bin" not in companions.find(str(source))
    assert "pickled" in said()[0]
    companions.find(str(source), quiet=True)
    assert said() == []


def test_a_snapshot_of_the_hub_cache_may_link_to_its_own_blobs(tmp_path):
    repo = tmp_path / "models--owner--name"
    write(repo, "blobs/abc", "MIT")
    (repo / "snapshots" / "rev").mkdir(parents=True)
    (repo / "snapshots" / "rev" / "LICENSE").symlink_to(repo / "blobs" / "abc")
    assert companions.find(str(repo / "snapshots" / "rev")).keys() == {"LICENSE"}
