"""Everything that a user can get wrong: one clear line, exit code 2, nothing written. Through the real command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

PROSE = "\n\n".join(
    f"Paragraph {i}: the quick brown fox jumps over the lazy dog, again and again, until both of them are tired."
    for i in range(200)
)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with a tiny dense model `dense` and a text `prose.txt`."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save_tiny("bert", folder / "dense")
    tiny.save_tiny("gpt2", folder / "causal")
    (folder / "prose.txt").write_text(PROSE)
    return folder


@pytest.fixture
def convert(cli, place):
    """Runs `pilon-compress convert` there, on `model`."""

    def convert(*words, model="dense", out="out", run=cli, **options):
        base = ("convert", model, "-o", out, "--calibration", "prose.txt", "--samples", "32", "--eval-data", "none")
        return run(*base, *words, cwd=place, code=None, **options)

    return convert


@pytest.fixture
def without_hub(command_line):
    """Runs the command where the hub is out of reach: at a port where nobody listens."""
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    return lambda *words, cwd, code: command_line.finish(command_line.start(*words, cwd=cwd, **nowhere), code)


def assert_refused(done, *expected):
    """Exit code 2 and one line on stderr that holds every expected word."""
    assert done.returncode == 2, done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in expected:
        assert word in lines[0], done.stderr


@pytest.fixture(autouse=True)
def nothing_left_behind(place):
    before = {p.name for p in place.iterdir()}
    yield
    assert {p.name for p in place.iterdir()} == before


def test_missing_path(convert):
    assert_refused(convert(model="./nowhere/model"), "./nowhere/model")


def test_hub_unreachable(convert, without_hub):
    done = convert(model="somebody/some-model", run=without_hub)
    assert_refused(done, "somebody/some-model", "hub")


def test_text_hub_unreachable_names_the_alternatives(convert, without_hub):
    source = "hub:Salesforce/wikitext:wikitext-2-raw-v1:train:text"
    done = convert("--calibration", source, run=without_hub)
    assert_refused(done, "Salesforce/wikitext", "stdlib", "stdin")


def test_not_a_transformers_model(convert, tmp_path):
    (tmp_path / "config.json").write_text('{"hello": "world"}')
    assert_refused(convert(model=tmp_path), str(tmp_path))


def test_no_feed_forward_found(convert, tmp_path):
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "state_size": 8, "vocab_size": 264}))
    assert_refused(convert(model=tmp_path), "no feed-forward projections", "--targets")


def test_a_model_of_images(convert, tmp_path):
    config = {"model_type": "resnet", "architectures": ["ResNetModel"], "depths": [1], "hidden_sizes": [8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(convert(model=tmp_path), "ResNetModel reads pixel_values")


@pytest.mark.parametrize("ratio", ["0", "1.5", "nan", "-1", "huge"])
def test_ratio(convert, ratio):
    assert_refused(convert("--ffn-ratio", ratio), "--ffn-ratio: must be ")


def test_plan_larger_than_dense(convert):
    done = convert("--rank", "16", "--n-primitives", "12")
    assert_refused(done, "more than the dense model", "--allow-larger")


def test_output_that_is_not_empty(convert, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    assert_refused(convert(out=tmp_path), "not empty", "--overwrite")
    assert_refused(convert("--overwrite", out=tmp_path), "holds no model")
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_the_source_is_never_overwritten(convert, place):
    before = (place / "dense" / "model.safetensors").read_bytes()
    assert_refused(convert("--overwrite", out="dense"), "holds the model that is read")
    assert (place / "dense" / "model.safetensors").read_bytes() == before


def test_a_model_whose_weights_are_not_plain_matrices(convert, place, tmp_path):
    assert convert("--ffn-ratio", "0.6", out=tmp_path / "p").returncode == 0
    assert_refused(convert(model=tmp_path / "p"), "already a PILON model")
    copy(place / "causal", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_refused(convert(model=tmp_path), "quantised (gptq)")


@pytest.mark.parametrize("words", [("convert", "-o", "out"), ("generate", "-p", "a")])
def test_a_device_that_is_not_there(cli, place, words):
    name, *rest = words
    assert_refused(cli(name, "causal", *rest, "--device", "cuda:99", cwd=place, code=None), "cuda:99")


def test_unknown_recipe_key_with_file_and_line(cli, place, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: dense\nbudget:\n  ffn_ratio: 0.5\n  rnak: 3\n")
    done = cli("convert", "--recipe", recipe, "-o", "out", cwd=place, code=None)
    assert_refused(done, f"{recipe}:4:", "rnak", "rank")


def test_truncated_weights(convert, place, tmp_path):
    copy(place / "dense", tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert_refused(convert(model=tmp_path), "model.safetensors")


def test_missing_pilon_tensor(cli, convert, place, tmp_path):
    assert convert("--ffn-ratio", "0.6", "--bands", "1", out=tmp_path / "p").returncode == 0
    path = tmp_path / "p" / "model.safetensors"
    tensors = load_file(path)
    lost = next(key for key in tensors if key.endswith("up.A"))
    save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})
    assert_refused(cli("eval", tmp_path / "p", "--data", "prose.txt", cwd=place, code=None), "model.safetensors")
    (tmp_path / "p" / "manifest.json").unlink()
    assert_refused(cli("eval", tmp_path / "p", "--data", "prose.txt", cwd=place, code=None), lost)


def test_calibration_shorter_than_one_batch(convert, tmp_path):
    (tmp_path / "short.txt").write_text("\n\n".join(PROSE.split("\n\n")[:6]))
    assert_refused(convert("--calibration", tmp_path / "short.txt"), "one batch needs")


def test_empty_calibration(convert, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert_refused(convert("--calibration", tmp_path / "empty.txt"), "empty.txt")


@pytest.mark.parametrize("key", ["encoder.layer.1.intermediate.dense.weight", "embeddings.word_embeddings.weight"])
def test_nan_in_weights(convert, place, tmp_path, key):
    copy(place / "dense", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if k.endswith(key))
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert_refused(convert(model=tmp_path), name)


def test_activations_that_overflow(convert, place, tmp_path):
    copy(place / "causal", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "c_attn.weight" in name or "ln_" in name:
            tensors[name] = torch.full_like(tensors[name], 1e38)
    save_file(tensors, path, metadata={"format": "pt"})
    assert_refused(convert("--sequence-length", "16", model=tmp_path), "NaN or infinite")


def test_a_full_disk_keeps_finished_work_and_the_same_command_goes_on(convert, tmp_path):
    out = tmp_path / "new" / "out"
    assert_refused(convert(file_limit=20_000, out=out), "cannot write", "finished work is kept")
    assert [p.name for p in out.parent.iterdir()] == [".out.partial"]
    assert convert(out=out).returncode == 0
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_overwriting_with_a_failure_keeps_the_old_model(convert, tmp_path):
    assert convert(out=tmp_path / "m").returncode == 0
    old = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert_refused(convert("--overwrite", out=tmp_path / "m", file_limit=20_000), "cannot write")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.partial", "m"]


def copy(source, target):
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
