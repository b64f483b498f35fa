"""Two processes heal what one would: every parameter has a part in every step, sharded or not."""

import json

import pytest
from safetensors.torch import load_file

from pilon_compress.config import conversion
from pilon_compress.config import training as recipes
from pilon_compress.convert.pipeline import convert
from pilon_compress.train.pipeline import train_model

TOLERANCE = 5e-4  # of weights around 0.1: sums in another order


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    texts = [f"{i}: the {i * i} of {i + 7} is " + "xyz"[i % 3] * (i % 23) + " as told" * (i % 9) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tiny.save_tiny("llama", folder / "dense")
    text = {"data": str(folder / "text.jsonl"), "samples": 16, "sequence_length": 32, "batch_size": 8}
    asked = {"model": str(folder / "dense"), "budget": {"ffn_ratio": 0.4}, "calibration": text, "effort": "fast"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PILON_CACHE", str(folder / "cache"))
        convert(conversion.build({**asked, "evaluation": {"data": "none"}}), folder / "pilon")
        yield folder


@pytest.mark.parametrize(
    ("parallel", "distill"),
    [("ddp", {"hidden": 0.1}), ("fsdp", {"cache_teacher": 16})],
)
def test_two_processes_heal_the_same_model_as_one(cli, home, tmp_path, parallel, distill):
    data = {"source": str(home / "text.jsonl"), "sequence_length": 32, "validation_sequences": 4}
    asked = {"task": "heal", "start": str(home / "pilon"), "device": "cpu", "data": data, "distill": distill}
    asked |= {"schedule": {"tokens": 6 * 8 * 32}, "run": {"batch_size": 8, "micro_batch_size": 3}}
    settings = recipes.build(asked, [f"run.parallel={parallel}"])
    (tmp_path / "recipe.yaml").write_text(recipes.dump(settings))
    words = ("train", "--recipe", "recipe.yaml", "-o", "two", "--json")
    done = cli.together(*words, processes=2, cwd=tmp_path)
    two = json.loads(done.stdout)
    one = train_model(recipes.build(asked), tmp_path / "one", quiet=True).dump()
    assert two["processes"] == 2 and two["tokens"] == one["tokens"]
    for name in ("val_perplexity", "before", "teacher"):
        assert two[name] == pytest.approx(one[name], rel=1e-3)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < TOLERANCE
