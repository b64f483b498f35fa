"""A training's output folder: what is begun is not lost, what is replaced comes back where the new run cannot start."""

import pytest
import torch

from pilon_compress.config import training as recipes
from pilon_compress.errors import BadInput
from pilon_compress.optimize.monitor import read_metrics
from pilon_compress.parallel import World
from pilon_compress.train.run import Run, claim, drop, held, settle


@pytest.fixture
def run(tmp_path):
    return Run(recipes.load("smoke"), tmp_path / "out", World(0, 1, torch.device("cpu")), "", True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def finished(run):
    (run.output / "old").mkdir(parents=True)
    (run.output / "config.json").write_text("{}")


def test_a_run_that_was_cut_off_says_how_to_go_on(run):
    assert claim(run, resume=False, overwrite=False)
    with pytest.raises(BadInput, match="--resume goes on with it, --overwrite starts anew"):
        claim(run, resume=False, overwrite=False)
    assert not claim(run, resume=True, overwrite=False)
    assert claim(run, resume=False, overwrite=True)


def test_resume_and_overwrite_contradict_each_other(run):
    with pytest.raises(BadInput, match="give one of them"):
        claim(run, resume=True, overwrite=True)


def test_the_model_that_is_replaced_is_back_where_nothing_can_be_trained(run, tmp_path):
    finished(run)
    assert claim(run, resume=False, overwrite=True)
    assert names(run.output) == ["recipe.yaml"]
    drop(run, fresh=True)
    assert names(run.output) == ["config.json", "old"] and names(tmp_path) == ["out"]


def test_and_is_gone_once_the_new_run_has_all_that_it_needs(run, tmp_path):
    finished(run)
    claim(run, resume=False, overwrite=True)
    settle(run)
    assert names(run.output) == ["recipe.yaml"] and names(tmp_path) == ["out"]


def test_a_folder_that_is_no_training_is_not_cleared(run):
    run.output.mkdir()
    (run.output / "recipe.yaml").write_text("flour: 500 g")
    with pytest.raises(BadInput, match="will not clear it"):
        claim(run, resume=False, overwrite=True)


def test_two_trainings_of_one_output_exclude_each_other(run, tmp_path):
    (tmp_path / ".out.lock").touch()  # of a process that was killed
    with held(run):
        assert names(tmp_path) == [".out.lock"]
    assert names(tmp_path) == []


def test_damaged_lines_of_the_metrics_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n{"st\xff\n[]\n{"step": "x"}\n{"step": 2, "loss": 1.0}\n{"ste'
    )
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "loss": 1.0}]
