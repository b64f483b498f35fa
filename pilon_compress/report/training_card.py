"""The model card of a trained model: README.md with the measured figures of train.json and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pilon_compress.config.training import TrainRecipe
from pilon_compress.report import formatting
from pilon_compress.report.conversion_card import _HUB_ID, _code, _fence, _table
from pilon_compress.report.training_page import PAGE, PICTURE, judged, title, what

Result = Mapping[str, Any]
RATIOS = {"stored_ratio": "Stored parameters", "bytes_ratio": "Bytes", "mac_ratio": "MACs per token"}


def model_card(result: Result, recipe: TrainRecipe, causal: bool = True) -> str:
    """The README.md, in Markdown with YAML front matter. `causal`: whether the model generates text."""
    sections = [
        _front_matter(result, recipe, causal),
        f"# {title(recipe) if recipe.start is None else _code(title(recipe)) + ', trained'}",
        f"This model {what(recipe)}, on {_code(result['data'])}. The full report is `{PAGE}`, its numbers are in "
        "`train.json` and `metrics.jsonl`.",
        "## Measured",
        _figures(result, recipe),
        f"![Loss, perplexity and rates over the training]({PICTURE})",
        "## Load",
        _loading(result, causal),
        "## Make it again",
        f"pilon-compress {result['pilon_compress']}, {formatting.number(result['seconds'])} s of training on "
        f"{result['processes']} × {_code(result['device'])}:",
        *([_fence(result["command"], "sh")] if result["command"] else []),
        "The whole recipe:",
        _fence(result["recipe"], "yaml"),
        "## Limits",
        _limits(result, recipe),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(result: Result, recipe: TrainRecipe, causal: bool) -> str:
    front: dict[str, Any] = {"library_name": "transformers"}
    base = recipe.start or ""
    if _HUB_ID.fullmatch(base) and not Path(base).is_dir() and not base.startswith("."):
        front["base_model"] = base
    front["pipeline_tag"] = "text-generation" if causal else "feature-extraction"
    front["tags"] = ["pilon"] if "model" in result else ["pilon-compress"]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _figures(result: Result, recipe: TrainRecipe) -> str:
    ffn, model = result["ffn"], result.get("model", {})
    figure = judged(result)
    rows = [
        [figure.label, f"**{figure.value}**", figure.meaning],
        [
            "Trained on",
            f"{formatting.short_count(result['tokens'])} tokens",
            f"{formatting.number(result['steps'])} steps",
        ],
        ["Parameters", formatting.short_count(result["parameters"]), "of the whole model"],
    ]
    for key, label in (
        ("stored_ratio", "Stored parameters"),
        ("bytes_ratio", "Bytes"),
        ("mac_ratio", "MACs per token"),
    ):
        whole = f", of the whole model {formatting.number(model[key])}" if model.get(key) is not None else ""
        rows.append([f"{label} ÷ dense", f"**{formatting.number(ffn[key])}**", f"of the FFN{whole}"])
    held = recipe.data.validation
    text = _code(held) if held else "documents of the same source that were not trained on"
    return f"{_table(['', 'This model', ''], rows)}\n\nJudged on {text}."


def _loading(result: Result, causal: bool) -> str:
    auto = "AutoModelForCausalLM" if causal else "AutoModel"
    code = (
        ("import pilon_compress  # teaches transformers the format\n" if "model" in result else "")
        + f"from transformers import {auto}, AutoTokenizer\n\n"
        + 'folder = "path/to/this/folder"\n'
        + f"model = {auto}.from_pretrained(folder)\n"
        + "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )
    return _fence(code, "python")


def _limits(result: Result, recipe: TrainRecipe) -> str:
    lines = [
        "The perplexity holds for the text named above; other languages, domains and tasks were not measured.",
        "It has learnt from that text alone, or from that text besides what it began with, with all their errors and "
        "biases.",
    ]
    if recipe.ternary.enabled:
        lines.append(
            "Stored are the numbers that its digits are made from, so the folder is as large as that of floats. What "
            "counts in its feed-forward part is a digit -1, 0 or 1 for each, and a few scales."
        )
    if result["ffn"]["mac_ratio"] > 1:
        lines.append("Its FFN stores less than it computes: MACs per token are above dense.")
    return "\n".join(f"- {line}" for line in lines)
