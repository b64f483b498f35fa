"""The model card: the README.md beside the saved weights, with the measured figures of the report and nothing else."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pilon_compress.report import formatting

Report = Mapping[str, Any]
_WHAT = {
    "pilon": "by PILON: a block keeps the neurons that the others cannot make up for, and each projection is one "
    "matrix, or a composition of low-rank primitives from a bank, its own or one that a band of layers shares",
    "whitened-svd": "by a low-rank product per layer, cut by SVD after whitening with the calibration inputs",
    "svd": "by a low-rank product per layer, cut by plain SVD of the weights",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def model_card(report: Report) -> str:
    """The README.md of a compressed model, in Markdown with YAML front matter.

    Every figure comes from `report` (see `report.conversion_page`); what was not measured is said to be so.
    `base_model` is stated only where the dense model has a hub id: the hub refuses anything else.
    """
    sections = [
        _front_matter(report),
        f"# {_code(report['source'])}, compressed",
        _introduction(report),
        "## Measured",
        _costs(report),
        *_quality(report),
        *_losses(report),
        "## Load",
        _loading(report),
        "## Make it again",
        f"pilon-compress {report['pilon_compress']}, {formatting.number(report['seconds'])} s, "
        f"at most {formatting.number(report['peak_rss_gib'])} GiB of memory:",
        _fence(report["command"], "sh"),
        "The whole recipe:",
        _fence(report["recipe"], "yaml"),
        "## Limits",
        _limits(report),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(report: Report) -> str:
    front: dict[str, Any] = {"library_name": "transformers"}
    source = report["source"]
    if _HUB_ID.fullmatch(source) and not os.path.isdir(source) and not source.startswith("."):
        front["base_model"] = source
    kind = (report["evaluation"] or {}).get("kind")
    if kind in ("causal", "encoder"):
        front["pipeline_tag"] = "text-generation" if kind == "causal" else "feature-extraction"
    front["tags"] = ["pilon", "compressed"]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---"


def _introduction(report: Report) -> str:
    layers = {layer for bank in report["plan"]["banks"] for layer in bank["layers"]}
    roles = formatting.in_order((bank["role"] for bank in report["plan"]["banks"]), formatting.ROLE_ORDER)
    how = _WHAT.get(report["method"], f"by {_code(report['method'])}")
    where = f"({_cell(', '.join(roles))}) of {len(layers)} layers"
    return (
        f"{_code(report['source'])} with the FFN projections {where} replaced {how}. "
        f"Everything else is the dense model's. Asked-for FFN ratio: {formatting.number(report['plan']['ffn_ratio'])}. "
        "The full report is `report.html`, its numbers are in `report.json`."
    )


def _costs(report: Report) -> str:
    ratios = formatting.ratios(report)
    rows = []
    for label in dict.fromkeys(ratio.label for ratio in ratios):
        ffn, model = (ratio for ratio in ratios if ratio.label == label)
        cells = [f"**{formatting.number(ratio.value)}** ({ratio.detail})" for ratio in (ffn, model)]
        dtypes = {"dtype": report["dtype"], "source": report.get("source_dtype", "bfloat16")}
        rows.append([label, *cells, _WHAT_OVER[label].format(**dtypes)])
    return _table(["Compressed ÷ dense", "FFN", "Whole model", "What is over what"], rows)


_WHAT_OVER = {
    formatting.STORED: "parameters kept ÷ parameters of the dense model",
    formatting.BYTES: "bytes saved as {dtype} ÷ bytes of the dense model in {source}",
    formatting.BYTES_BF16: "bytes saved as {dtype} ÷ bytes of the dense model in bfloat16",
    formatting.MACS: "multiply-accumulates per token ÷ those of the dense model",
}


def _quality(report: Report) -> list[str]:
    figures = formatting.quality(report["evaluation"])
    if not figures:
        return ["Quality was **not measured**: this conversion ran without an evaluation."]
    rows = [[f.label, f"**{f.value}**", f.dense or formatting.NONE, f.meaning] for f in figures]
    return [
        _table(["Quality", "This model", "Dense model", "Meaning"], rows),
        f"Measured on: {_facts(report['evaluation'])}.",
    ]


def _facts(details: Mapping[str, Any] | None) -> str:
    rows = formatting.circumstances(details)
    return "; ".join(f"{label if label[:3].isupper() else label.lower()} {_code(value)}" for label, value in rows)


def _losses(report: Report) -> list[str]:
    order = [report["method"], *formatting.METHOD_NAMES]
    rows = []
    for method in formatting.in_order(report["whitened_loss"], list(dict.fromkeys(order))):
        name = _cell(formatting.method_name(method))
        ours = method == report["method"]
        value = formatting.number(report["whitened_loss"][method])
        rows.append([f"{name} (this model)" if ours else name, f"**{value}**" if ours else value])
    return [
        _table(["Method", "Whitened loss"], rows),
        f"Whitened loss: {formatting.WHITENED_LOSS} ({_facts(report['calibration'])}); 0 is the dense model.",
    ]


def _loading(report: Report) -> str:
    kind = (report["evaluation"] or {}).get("kind")
    auto = "AutoModelForCausalLM" if kind == "causal" else "AutoModel"
    code = (
        "import pilon_compress  # teaches transformers the format\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        'folder = "path/to/this/folder"\n'
        f"model = {auto}.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )
    return f"Any Auto class that fits the dense model works.\n\n{_fence(code, 'python')}"


def _limits(report: Report) -> str:
    measured = bool(formatting.quality(report["evaluation"]))
    lines = [
        "The quality figures hold for the text named above; other languages, domains and tasks were not measured."
        if measured
        else "Quality was not measured: measure it on your own text before use.",
        "Whitened loss is measured on the calibration text itself, and ranks methods; it is no quality figure.",
        "Loading needs the Python package `pilon_compress`.",
        "Licence, training data, biases and intended use are those of the dense model; see its own card.",
    ]
    heavier = [part for key, part in (("ffn", "FFN"), ("model", "whole model")) if _more(report[key]["mac_ratio"])]
    if heavier:
        lines.insert(
            1, f"It stores less than it computes: MACs per token are above dense for the {' and the '.join(heavier)}."
        )
    lines += [_cell(line) for line in report.get("notes", [])]
    return "\n".join(f"- {line}" for line in lines)


def _more(ratio: float | None) -> bool:
    return ratio is not None and ratio > 1


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot end a table cell, open a tag or break a line."""
    return re.sub(r"([\\|<>\[\]`*_])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text as an inline code span that it cannot leave."""
    line = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _fence(text: str, language: str) -> str:
    """Text as a code block that it cannot leave."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"
