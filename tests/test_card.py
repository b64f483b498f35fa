"""The model card: what a person who finds the folder needs, every measured figure, and no other figure."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from pilon_compress.report.card import conversion_card as model_card
from pilon_compress.report.card import packed_card
from pilon_compress.report.formatting import number

SIZES = {
    "stored_ratio": 0.49713,
    "bytes_ratio": 0.49829,
    "mac_ratio": 0.74631,
    "stored": 3_518_592,
    "dense_stored": 7_077_888,
    "bytes": 7_054_000,
    "dense_bytes": 14_155_776,
    "macs": 5_282_000,
    "dense_macs": 7_077_888,
}
BANK = {
    "d_in": 384,
    "d_out": 1536,
    "n_primitives": 24,
    "rank": 16,
    "top_k": 12,
    "composition": "component",
    "stored": 737_280,
    "dense_stored": 1_769_472,
    "macs": 1_105_920,
    "dense_macs": 1_769_472,
}
REPORT: dict[str, Any] = {
    "format_version": 1,
    "dtype": "float32",
    "pilon_compress": "0.1.0",
    "command": "pilon-compress convert acme/small-model -o out/x --ffn-ratio 0.5",
    "source": "acme/small-model",
    "method": "pilon",
    "output": "out/x",
    "plan": {
        "ratio": 0.5,
        "ffn_ratio": 0.5,
        "bands": [[0, 1, 2]],
        "banks": [{"band": 0, "role": role, "layers": [0, 1, 2], **BANK} for role in ("up", "down")],
    },
    "ffn": SIZES,
    "model": SIZES | {"stored_ratio": 0.84217, "bytes_ratio": 0.84398, "mac_ratio": 0.91234},
    "whitened_loss": {"pilon": 0.03127, "whitened-svd": 0.03981, "svd": 0.2214},
    "projections": [],
    "banks": [],
    "kept": [{"name": "embeddings", "parameters": 11_720_448, "share": 0.5}],
    "calibration": {"data": "stdlib", "texts": 512, "tokens": 40_321},
    "evaluation": {"cosine": 0.89634, "neighbors10": 0.69127, "texts": 487, "data": "held.txt", "kind": "encoder"},
    "seconds": 41.23,
    "peak_rss_gib": 1.437,
    "recipe": "model: acme/small-model\nbudget:\n  ffn_ratio: 0.5\n",
}
CAUSAL = {
    "perplexity": 48.06,
    "dense_perplexity": 43.21,
    "perplexity_ratio": 1.1122,
    "bits_per_byte": 1.0731,
    "dense_bits_per_byte": 1.0437,
    "kl": 0.10467,
    "top1_agreement": 0.8713,
    "tokens": 245_569,
    "bytes": 1_288_540,
    "window": 1024,
    "stride": 512,
    "eos": True,
    "data": "held.txt",
    "kind": "causal",
}


def report_with(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(REPORT) | changes


def front_matter(card: str) -> dict[str, Any]:
    parts = card.split("---\n", 2)
    assert parts[0] == ""
    loaded: dict[str, Any] = yaml.safe_load(parts[1])
    return loaded


@pytest.mark.parametrize("evaluation", [REPORT["evaluation"], CAUSAL], ids=["encoder", "causal"])
def test_states_every_measured_figure_the_command_and_the_recipe(evaluation: dict[str, Any]) -> None:
    card = model_card(report_with(evaluation=evaluation))
    figures = [value for part in ("ffn", "model") for key, value in REPORT[part].items() if "ratio" in key]
    figures += list(REPORT["whitened_loss"].values())
    figures += [value for value in evaluation.values() if isinstance(value, int | float) and value is not True]
    assert [number(figure) for figure in figures if number(figure) not in card] == []
    for text in (
        REPORT["command"],
        REPORT["recipe"].strip(),
        "512",
        "40,321",
        "stdlib",
        "held.txt",
        "41.2 s",
        "1.44 GiB",
    ):
        assert text in card


def test_table_rows_are_whole() -> None:
    for line in model_card(report_with(evaluation=CAUSAL)).splitlines():
        if line.startswith("|"):
            assert line.endswith("|") and line.count("|") in (3, 5)


def test_without_evaluation_no_quality_is_claimed() -> None:
    card = model_card(report_with(evaluation=None))
    assert "not measured" in card
    for word in ("cosine", "neighbour", "perplexity", "bits per byte", "agreement", "kl ", "lossless"):
        assert word not in card.lower()
    assert "pipeline_tag" not in front_matter(card)


def test_a_language_model_measured_alone_claims_nothing_about_the_dense_one() -> None:
    alone = {key: value for key, value in CAUSAL.items() if key in ("perplexity", "bits_per_byte", "tokens", "kind")}
    card = model_card(report_with(evaluation=alone))
    assert "48.1" in card
    for word in ("Perplexity ratio", "KL", "agreement"):
        assert word not in card


@pytest.mark.parametrize("evaluation", [REPORT["evaluation"], CAUSAL, None], ids=["encoder", "causal", "none"])
def test_no_figure_that_is_not_in_the_report(evaluation: dict[str, Any] | None) -> None:
    """Check that every printed value disappears when the report's own values are taken away."""
    report = report_with(evaluation=evaluation)
    card = model_card(report)
    prose = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE).split("---\n", 2)[2]
    for fixed in (
        "10 nearest",
        "1 is lossless",
        "0 is lossless",
        "0 is the dense model",
        "Top-1",
        "bfloat16",
        "float32",
    ):
        prose = prose.replace(fixed, "")
    known = {number(value) for value in leaves(report)} | {"3"}  # three layers
    known |= {number(value / scale) for value in leaves(report) for scale in (1e3, 1e6, 2**20)}
    printed = set(re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", prose.replace("0.1.0", "")))
    assert printed and printed - known == set()


def leaves(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        children = value.values() if isinstance(value, dict) else value
        return [leaf for child in children for leaf in leaves(child)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_front_matter_names_the_library_the_base_and_the_task() -> None:
    front = front_matter(model_card(report_with(evaluation=CAUSAL)))
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "acme/small-model"
    assert front["pipeline_tag"] == "text-generation"
    assert {"pilon", "compressed"} <= set(front["tags"])


@pytest.mark.parametrize("evaluation", [REPORT["evaluation"], CAUSAL], ids=["encoder", "causal"])
def test_the_hub_reads_the_metadata(tmp_path: Path, evaluation: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_text(model_card(report_with(evaluation=evaluation)), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "acme/small-model" and data.library_name == "transformers"
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found and all(evaluation[key] == value for key, value in found.items())
    assert set(found) == {"perplexity", "perplexity_ratio", "bits_per_byte", "kl", "top1_agreement"} & set(
        evaluation
    ) | {"cosine", "neighbors10"} & set(evaluation)
    assert {result.dataset_name for result in data.eval_results} == {"held.txt"}


def test_a_data_set_of_the_hub_is_named_as_the_hub_names_it(tmp_path: Path) -> None:
    named = CAUSAL | {"data": "hub:Salesforce/wikitext:wikitext-2-raw-v1:test:text"}
    (tmp_path / "README.md").write_text(model_card(report_with(evaluation=named)), encoding="utf-8")
    (result, *_) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
        *("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    )


@pytest.mark.parametrize(("source", "dense", "base"), [("out/a", "acme/x", "acme/x"), ("out/a", "./b", None)])
def test_a_packed_model_names_the_dense_one_at_its_beginning(
    tmp_path: Path, source: str, dense: str, base: str | None
) -> None:
    made = {"source": "./" + source, "dense": dense, "output": "out/b", "kind": "causal", "formats": ["ternary-base3"]}
    sizes = {"ffn": SIZES, "model": SIZES, "max_logit_difference": 0.0, "pilon_compress": "0.1.0"}
    (tmp_path / "README.md").write_text(packed_card({**made, **sizes}), encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base and "packed" in card.data.tags and "'out/b'" in card.text


def test_base_model_is_only_ever_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for source in ("models/mine", "./mine", "/data/mine", "package:some_model", "C:\\models\\mine", "a/b/c"):
        card = model_card(report_with(source=source))
        assert "base_model" not in front_matter(card), source
        assert f"`{source}`" in card


def test_hostile_text_stays_inside_its_place() -> None:
    evil = "x`|\n---\ntags: [evil]\n# Heading\n```\n<script>alert(1)</script>"
    card = model_card(report_with(source=evil, command=evil, recipe=evil, method=evil, whitened_loss={evil: 0.25}))
    assert front_matter(card)["tags"] == ["pilon", "compressed"]
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)
    assert "# Heading" not in [line.strip() for line in outside.splitlines()]
    rows = [line for line in outside.splitlines() if "0.250" in line]
    assert len(rows) == 1 and "<script" not in rows[0].replace("\\<script", "")


@pytest.mark.parametrize(("kind", "auto"), [(CAUSAL, "AutoModelForCausalLM"), (REPORT["evaluation"], "AutoModel")])
def test_loading_code_compiles_and_imports_the_package_first(kind: dict[str, Any], auto: str) -> None:
    card = model_card(report_with(evaluation=kind))
    code = re.search(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    assert code
    compile(code[1], "card", "exec")
    assert code[1].startswith("import pilon_compress")
    assert f"{auto}.from_pretrained(" in code[1]


def test_more_work_than_dense_is_a_stated_limit() -> None:
    assert "above dense" not in model_card(REPORT)
    card = model_card(report_with(ffn=SIZES | {"mac_ratio": 1.327}))
    assert "above dense for the FFN." in card and "1.33" in card


def test_methods_describe_themselves() -> None:
    assert "keeps the neurons" in model_card(REPORT)
    for method in ("svd", "whitened-svd"):
        card = model_card(report_with(method=method))
        assert "keeps the neurons" not in card and "low-rank product per layer" in card
