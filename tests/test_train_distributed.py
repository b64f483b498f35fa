"""Two processes train what one would: DDP and FSDP2, under the real torchrun, and a run changes its number of them."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

WORDS = ("train", "--recipe", "smoke", "--json", "--set", "device=cpu", "--set", "run.micro_batch_size=5")
TOLERANCE = 2e-4  # of weights around 0.1 after six steps: sums in another order


@pytest.fixture(scope="module")
def launch(cli, command_line):
    """`launch(folder, output, processes, *words)`: what such a training prints as JSON; DDP under the real torchrun."""

    def launch(folder: Path, output: str, processes: int, *words: str) -> dict:
        words = (*WORDS, "-o", output, *words)
        cache = str(folder / "tokens")
        if "run.parallel=ddp" in words:
            process = command_line.start(*words, cwd=folder, processes=processes, PILON_CACHE=cache)
            return json.loads(command_line.finish(process).stdout)
        if processes > 1:
            return json.loads(cli.together(*words, processes=processes, cwd=folder, PILON_CACHE=cache).stdout)
        return json.loads(cli(*words, cwd=folder, PILON_CACHE=cache).stdout)

    return launch


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, launch(folder, "one", 1, "--tokens", "6144")


def difference(folder: Path, first: str, second: str) -> float:
    a, b = (load_file(folder / name / "model.safetensors") for name in (first, second))
    assert set(a) == set(b)
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_same_model_as_one(launch, alone, parallel):
    folder, expected = alone
    result = launch(folder, parallel, 2, "--tokens", "6144", "--set", f"run.parallel={parallel}")
    assert result["tokens"] == expected["tokens"] and result["processes"] == 2
    assert result["val_perplexity"] == pytest.approx(expected["val_perplexity"], rel=1e-3)
    assert difference(folder, "one", parallel) < TOLERANCE


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_route_and_balance_as_one(launch, alone, parallel):
    folder, _ = alone
    moe = "experts=4,top_k=2,balance=0,z_loss=0.01,bias_rate=0.003"  # Switch's loss is no sum over processes
    words = ["--tokens", "4096", "--moe", moe]
    expected = launch(folder, "experts", 1, *words) if not (folder / "experts/train.json").is_file() else None
    result = launch(folder, f"experts-{parallel}", 2, *words, "--set", f"run.parallel={parallel}")
    expected = expected or json.loads((folder / "experts/train.json").read_text())
    assert result["val_perplexity"] == pytest.approx(expected["val_perplexity"], rel=1e-3)
    for name, load in expected["routing"]["load"].items():
        assert result["routing"]["load"][name] == pytest.approx(load, abs=0.01)
    assert difference(folder, "experts", f"experts-{parallel}") < TOLERANCE


def test_a_sharded_run_goes_on_alone(launch, alone):
    folder, expected = alone
    words = ("--tokens", "6144", "--set", "run.parallel=fsdp", "--set", "run.checkpoint_every=0.001")
    launch(folder, "moved", 2, *words, "--set", "run.keep=100")
    for path in sorted((folder / "moved/checkpoints").glob("step-*"))[3:]:  # as if it had been stopped after step 3
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    result = launch(folder, "moved", 1, "--tokens", "6144", "--resume")
    assert result["val_perplexity"] == pytest.approx(expected["val_perplexity"], rel=1e-3)
    assert difference(folder, "one", "moved") < TOLERANCE
    assert {path.suffix for path in (folder / "moved/checkpoints").rglob("*") if path.is_file()} <= {
        ".safetensors",
        ".json",
    }


def test_two_processes_choose_alike_and_a_sharded_bank_keeps_what_was_not_used(launch, alone):
    folder, _ = alone
    words = ["--tokens", "4096", "--set", "research.original.selection.explore=gumbel"]
    words += ["--set", "research.original.staged.entropy=0.01"]
    words += ["--set", "ffn.rank=4", "--set", "ffn.n_primitives=12", "--set", "ffn.top_k=3"]
    expected = launch(folder, "explored", 1, *words)
    result = launch(folder, "explored-fsdp", 2, *words, "--set", "run.parallel=fsdp")
    assert result["val_perplexity"] == pytest.approx(expected["val_perplexity"], rel=1e-3)
    assert result["parameters"] == expected["parameters"]
    assert difference(folder, "explored", "explored-fsdp") < TOLERANCE
