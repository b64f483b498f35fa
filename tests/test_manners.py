"""Manners of a library: importing and calling it leaves the process as it was, and it speaks through logging."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from transformers.utils import logging as transformers_logging

from pilon_compress.data.readers import hub as data_hub
from pilon_compress.errors import BadInput
from pilon_compress.io import hub, progress
from pilon_compress.models import checkpoint, stream_check

PROBE = """
import importlib, logging, os, pkgutil, sys
import torch, transformers, datasets, huggingface_hub
from transformers.utils import logging as tl
def state():
    offline = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    levels = tl.get_verbosity(), tl.is_progress_bar_enabled(), logging.getLogger("datasets").level
    numbers = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().tolist()
    return dict(os.environ), offline, levels, logging.getLogger().handlers, numbers
before = state()
import pilon_compress
found = [m.name for m in pkgutil.walk_packages(pilon_compress.__path__, "pilon_compress.")]
for name in found:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(found) > 150, [i for i, (a, b) in enumerate(zip(before, state())) if a != b])
"""


def test_importing_every_module_changes_nothing_of_the_process():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.stdout.strip() == "True []", done.stdout + done.stderr
    assert done.stderr == ""


@pytest.fixture
def unreachable(monkeypatch):
    """A hub that is out of reach, though nobody has said so."""
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "DISABLE_SAFETENSORS_CONVERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.unreachable.cache_clear()
    yield constants
    hub.unreachable.cache_clear()


def test_a_hub_out_of_reach_is_remembered_for_the_length_of_a_call(unreachable):
    import datasets

    before = dict(os.environ), datasets.config.HF_HUB_OFFLINE
    with pytest.raises(BadInput, match="out of reach"):
        checkpoint.load_config("nobody/nothing")
    with pytest.raises(BadInput, match="out of reach"):
        list(data_hub.read("nobody/nothing", "", "train"))
    assert not unreachable.HF_HUB_OFFLINE and (dict(os.environ), datasets.config.HF_HUB_OFFLINE) == before
    with hub.reaching() as offline:
        assert offline and unreachable.HF_HUB_OFFLINE


def test_loading_a_model_keeps_the_log_level_and_the_progress_bars_of_transformers(tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path)
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        for wanted in (logging.INFO, logging.CRITICAL):
            transformers_logging.set_verbosity(wanted)
            transformers_logging.enable_progress_bar()
            checkpoint.load_model(str(tmp_path))
            checkpoint.load_tokenizer(str(tmp_path))
            assert transformers_logging.get_verbosity() == wanted
            assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(level)
        if not bars:
            transformers_logging.disable_progress_bar()


def test_bad_input_is_a_value_error_and_keeps_its_words(tiny, tmp_path, monkeypatch):
    assert issubclass(BadInput, ValueError)
    tiny.save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"^[^:]* holds only pickled weights"):  # not as the reason of another refusal
        checkpoint.load_model(str(tmp_path))

    def refuse(*_):
        raise BadInput("its blocks cannot be walked")

    monkeypatch.setattr(stream_check, "Stream", refuse)
    with pytest.raises(BadInput, match="^its blocks cannot be walked$"):
        stream_check.check_walk(tiny.tiny_model("llama").to("meta"))


def test_a_call_of_the_library_shows_no_progress_and_logs_its_messages(tiny, tmp_path, capfd, caplog):
    from pilon_compress.evaluate.evaluate import evaluate

    tiny.save_tiny("llama", tmp_path / "model")
    rows = '{"text": null}\n' + "".join(f'{{"text": "Text {i} of an ordinary kind."}}\n' for i in range(50))
    (tmp_path / "t.jsonl").write_text(rows)
    assert not progress._on
    evaluate(str(tmp_path / "model"), data=str(tmp_path / "t.jsonl"))
    assert capfd.readouterr().out == ""
    (record,) = [one for one in caplog.records if one.name.partition(".")[0] == "pilon_compress"]
    assert record.levelno == logging.WARNING and "1 of 51 rows" in record.getMessage()
    assert torch.get_default_dtype() == torch.float32
