"""Trackers get the numbers of metrics.jsonl; one that is missing or does not start leaves nothing behind."""

import json
import sys

import pytest

from pilon_compress.config import training
from pilon_compress.errors import BadInput
from pilon_compress.train.pipeline import train_model


def short(tracker):
    asked = ["schedule.tokens=4096", f"run.track=[{tracker}]", "run.log_every=1"]
    return training.load("smoke", asked)


def test_tensorboard_has_what_metrics_jsonl_has(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_model(short("tensorboard"), tmp_path / "out", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line}, rel=1e-5)
    judged = {line["step"]: line["val_perplexity"] for line in lines if "val_perplexity" in line}
    assert {e.step: e.value for e in events.Scalars("val_perplexity")} == pytest.approx(judged, rel=1e-5)


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(BadInput, match="run.track names trackio, which is not installed: pip install trackio"):
        train_model(short("trackio"), tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_does_not_start_leaves_nothing(tmp_path, monkeypatch):
    class Refusing:
        def init(self, **_):
            raise RuntimeError("no login\nfor details see elsewhere")

    monkeypatch.setitem(sys.modules, "wandb", Refusing())
    with pytest.raises(BadInput, match="^run.track: wandb did not start: no login$"):
        train_model(short("wandb"), tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())
