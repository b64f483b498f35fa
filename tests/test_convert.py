"""The command line's contract, on a tiny encoder and a tiny causal LM, each call a process of its own."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from pilon_compress.nn.installed import layout_of


def prose(start, count):
    words = ("the", "model", "layer", "weight", "bank", "primitive", "rank", "token", "memory", "reader", "engine")
    lines = []
    for i in range(start, start + count):
        picked = " ".join(words[(i * 7 + j * j) % len(words)] for j in range(16))
        lines.append(f"Paragraph {chr(97 + i % 26)} says that {picked} and nothing more than that.")
    return "\n\n".join(lines)


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def converted(request, cli, tiny, tmp_path_factory):
    """(folder, the JSON that convert printed)."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_tiny(request.param, folder / "dense")
    (folder / "text.txt").write_text(prose(0, 150))
    (folder / "other.txt").write_text(prose(500, 40))
    words = ("convert", "dense", "-o", "out", "--ffn-ratio", "0.6", "--calibration", "text.txt", "--samples", "64")
    done = cli(*words, "--seed", "3", "--json", cwd=folder)
    assert done.stderr == ""
    return folder, json.loads(done.stdout)


def test_convert_json_has_the_promised_keys(cli, converted):
    folder, report = converted
    for key in ("stored_ratio", "bytes_ratio", "mac_ratio"):
        assert 0 < report["ffn"][key] <= 2 and report["model"][key] > 0
    assert report["ffn"]["stored_ratio"] <= 0.6
    assert list(report["whitened_loss"]) == ["pilon", "whitened-svd", "svd"]
    assert all(0 <= loss < 1 for loss in report["whitened_loss"].values())
    assert report["seconds"] > 0 and 0.1 < report["peak_rss_gib"] < 8 and report["output"] == "out"


def test_the_folder_holds_everything(cli, converted):
    folder, report = converted
    out = folder / "out"
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "README.md", "report.html"} <= names
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "no temporary folder stays"
    assert json.loads((out / "report.json").read_text()) == report
    card = (out / "README.md").read_text()
    assert "pilon-compress convert dense -o out --ffn-ratio 0.6" in card
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["model"] == "dense" and recipe["seed"] == 3 and recipe["calibration"]["data"] == "text.txt"
    assert recipe["calibration"]["sequence_length"] in (128, 256), "defaults that depend on the model are pinned"


def test_the_card_loads_on_the_hub_and_its_code_runs(converted, monkeypatch):
    folder, report = converted
    card = ModelCard.load(folder / "out" / "README.md")
    assert "base_model" not in card.data.to_dict(), "the dense model is a folder"
    told = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert told and all(report["evaluation"][key] == value for key, value in told.items())
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], found)
    assert layout_of(found["model"]).projections or layout_of(found["model"]).matrices


def test_size_is_what_the_file_holds(cli, converted):
    folder, report = converted
    tensors = load_file(folder / "out" / "model.safetensors")
    dense = load_file(folder / "dense" / "model.safetensors")
    layers = report["projections"]
    kept = sum(t.numel() for name, t in tensors.items())
    replaced = {p["name"] for p in layers}
    ffn_dense = sum(t.numel() for name, t in dense.items() if any(f"{r}." in name for r in replaced))
    rest = sum(t.numel() for t in dense.values()) - ffn_dense
    assert report["ffn"]["dense_stored"] == ffn_dense
    assert report["ffn"]["stored"] == kept - rest


def test_loads_with_transformers_and_runs(cli, converted):
    import pilon_compress  # noqa: F401

    folder, report = converted
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    model = AutoModel.from_pretrained(folder / "out")
    dense = AutoModel.from_pretrained(folder / "dense")
    batch = tokenizer("the bank of a band", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (m(input_ids=batch["input_ids"]).last_hidden_state for m in (model, dense))
    assert ours.shape == theirs.shape
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.5
    assert not torch.allclose(ours, theirs, atol=1e-6)


def test_eval_json_has_the_promised_keys(cli, converted):
    folder, report = converted
    done = cli("eval", "out", "--against", "dense", "--data", "other.txt", "--json", cwd=folder)
    result = json.loads(done.stdout)
    if report["evaluation"]["kind"] == "encoder":
        assert {"cosine", "neighbors10", "texts"} <= set(result)
        assert 0.5 < result["cosine"] < 1 and 0 < result["neighbors10"] <= 1 and result["texts"] == 40
    else:
        for key in ("perplexity", "dense_perplexity", "kl", "top1_agreement", "bits_per_byte", "tokens"):
            assert result[key] > 0
        assert result["perplexity_ratio"] == pytest.approx(result["perplexity"] / result["dense_perplexity"])
    assert result["data"] == "other.txt"


def test_eval_against_itself_is_lossless_and_finds_the_dense_model(cli, converted):
    folder, report = converted
    result = json.loads(cli("eval", "dense", "--against", "dense", "--data", "other.txt", "--json", cwd=folder).stdout)
    if result["kind"] == "encoder":
        assert result["cosine"] == pytest.approx(1, abs=1e-5) and result["neighbors10"] == 1
    else:
        assert result["perplexity_ratio"] == 1 and result["kl"] < 1e-9 and result["top1_agreement"] == 1
    found = json.loads(cli("eval", "out", "--data", "text.txt", "--json", cwd=folder).stdout)
    assert found["against"] == "dense", "the dense model is known from recipe.yaml"
    assert found["data"] == "text.txt (held-out part)", "calibration text is left out of its own evaluation"


def test_the_saved_recipe_makes_the_same_weights(cli, converted):
    folder, report = converted
    cli("convert", "--recipe", "out/recipe.yaml", "-o", "again", "--eval-data", "none", cwd=folder)
    first, second = ((folder / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second


def test_dry_run_writes_nothing_and_says_what_it_would_do(cli, converted):
    folder, report = converted
    before = sorted(p.name for p in folder.iterdir())
    words = ("convert", "dense", "-o", "dry", "--ffn-ratio", "moderate", "--calibration", "text.txt", "--dry-run")
    result = json.loads(cli(*words, "--json", cwd=folder).stdout)
    assert result["plan"]["ffn_ratio"] == 0.5 and result["ffn"]["stored_ratio"] <= 0.5
    assert result["estimate"]["seconds"] > 0 and result["estimate"]["peak_gib"] > 0
    assert "top-k" in cli(*words, cwd=folder).stdout
    assert sorted(p.name for p in folder.iterdir()) == before


def test_inspect_dense_and_pilon(cli, converted):
    folder, report = converted
    dense = json.loads(cli("inspect", "dense", "--json", cwd=folder).stdout)
    assert dense["form"] == "dense" and len(dense["projections"]) == 6
    assert dense["replaced"] == report["ffn"]["dense_stored"]
    assert all(p["macs"] == p["d_in"] * p["d_out"] for p in dense["projections"])
    pilon = json.loads(cli("inspect", "out", "--json", cwd=folder).stdout)
    assert pilon["form"] == "pilon" and pilon["ffn"]["stored_ratio"] == pytest.approx(report["ffn"]["stored_ratio"])
    assert "would be replaced" in cli("inspect", "dense", "--ignore", "re:.*0", cwd=folder).stdout


def test_plans_are_drawn_from_the_config_alone(cli, tiny, tmp_path):
    """Plan a model far larger than memory whose weights do not exist."""
    config = tiny.tiny_model("gpt2").config
    config.n_embd, config.n_inner, config.architectures = 32768, 131072, ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "huge")
    seen = json.loads(cli("inspect", "huge", "--json", cwd=tmp_path).stdout)
    assert sum(p["bytes"] for p in seen["projections"]) > 6 * 32768 * 131072 * 2
    planned = json.loads(cli("convert", "huge", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert planned["ffn"]["dense_stored"] == seen["replaced"] and planned["estimate"]["peak_gib"] > 90


def test_exports_through_the_command_line(cli, converted):
    folder, report = converted
    cli("export", "out", "--to", "dense", "-o", "plain", cwd=folder)
    cli("export", "out", "--to", "self-contained", "-o", "own", cwd=folder)
    assert (folder / "own" / "modeling_pilon.py").exists()
    auto = AutoModelForCausalLM if report["evaluation"]["kind"] == "causal" else AutoModel
    ids = torch.arange(6, 26)[None]
    outputs = []
    for name in ("out", "plain"):
        with torch.no_grad():
            outputs.append(auto.from_pretrained(folder / name)(input_ids=ids)[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    refused = cli("export", "plain", "--to", "dense", "-o", "plainer", cwd=folder, code=2)
    assert "dense model already" in refused.stderr


def test_generate(cli, converted):
    folder, report = converted
    words = ("generate", "out", "--prompt", "the model", "--max-new-tokens", "5", "--json")
    if report["evaluation"]["kind"] == "encoder":
        assert "does not generate" in cli(*words, cwd=folder, code=2).stderr
        return
    result = json.loads(cli(*words, cwd=folder).stdout)
    assert result["prompt"] == "the model" and result["completion"]
    assert json.loads(cli(*words, cwd=folder).stdout) == result, "greedy decoding is deterministic"


def test_text_from_stdin_and_a_peer_method(cli, converted):
    folder, report = converted
    words = ("convert", "dense", "-o", "piped", "--method", "svd", "--calibration", "stdin", "--json")
    result = json.loads(cli(*words, cwd=folder, stdin=prose(0, 150)).stdout)
    assert list(result["whitened_loss"]) == ["svd", "whitened-svd"]
    assert result["evaluation"]["data"] == "stdin (held-out part)"


def test_too_little_held_out_text_skips_the_evaluation_and_says_so(cli, converted):
    folder, report = converted
    if report["evaluation"]["kind"] != "encoder":
        return
    (folder / "short.txt").write_text(prose(0, 30))
    done = cli("convert", "dense", "-o", "short", "--calibration", "short.txt", "--samples", "16", cwd=folder)
    assert "not evaluated" in done.stdout and "too few" in done.stdout


def test_bfloat16_output(cli, converted):
    folder, report = converted
    words = ("convert", "dense", "-o", "half", "--dtype", "bfloat16", "--calibration", "text.txt", "--json")
    result = json.loads(cli(*words, cwd=folder).stdout)
    tensors = load_file(folder / "half" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} - {torch.int64} == {torch.bfloat16}
    assert result["ffn"]["bytes_ratio"] == pytest.approx(result["ffn"]["stored_ratio"], rel=0.05)
