"""Write a comparison of methods: rows with means and ranges, compare.json, compare.html and compare.md."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pilon_compress.report import formatting, frontier_plot
from pilon_compress.report.methods import method_of

Result = Mapping[str, Any]

# The metric that rows are sorted by, then the others.
QUALITY = {"encoder": ("cosine", "neighbors10"), "causal": ("perplexity_ratio", "kl", "top1_agreement")}
PLOTTED = {"encoder": ("cosine", "neighbors10"), "causal": ("perplexity_ratio", "top1_agreement")}
LESS_IS_BETTER = ("perplexity_ratio", "kl")
LABELS = {
    "cosine": "cosine to dense",
    "neighbors10": "neighbours kept",
    "perplexity_ratio": "perplexity ÷ dense",
    "kl": "KL to dense, nats",
    "top1_agreement": "top-1 agreement",
}


class Column(NamedTuple):
    """A column of the tables: its heading, and the function that finds its value in a cell."""

    label: str
    of: Callable[[Mapping[str, Any]], float]


def columns(kind: str) -> dict[str, Column]:
    """Return the columns of a comparison of `kind` (encoder or causal) by key, in reading order."""
    by_key = {
        "stored_ratio": Column("stored ÷ dense", lambda cell: cell["ffn"]["stored_ratio"]),
        "bytes_ratio": Column("bytes ÷ dense", lambda cell: cell["ffn"]["bytes_ratio"]),
        "mac_ratio": Column("MACs ÷ dense", lambda cell: cell["ffn"]["mac_ratio"]),
        "model_stored_ratio": Column("whole model stored", lambda cell: cell["model"]["stored_ratio"]),
        "whitened_loss": Column("whitened loss", lambda cell: cell["whitened_loss"]),
    }
    for key in QUALITY[kind]:
        by_key[key] = Column(LABELS[key], lambda cell, key=key: cell["quality"][key])  # type: ignore[misc]
    return by_key


def summarise(cells: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return `kind`, `evaluation` (its circumstances), `dense`, and `rows`: one for each ratio and method.

    A row holds mean, low and high over the seeds of every column; rows of one ratio are sorted best first.
    """
    kind = dense["quality"]["kind"]
    by_key = columns(kind)
    rows = []
    for ratio, method in dict.fromkeys((cell["ratio"], cell["method"]) for cell in cells):
        members = [cell for cell in cells if (cell["ratio"], cell["method"]) == (ratio, method)]
        figures = {key: _over_seeds([column.of(cell) for cell in members]) for key, column in by_key.items()}
        rows.append({"ratio": ratio, "method": method, "seeds": len(members), **figures})
    main = QUALITY[kind][0]
    sign = 1 if main in LESS_IS_BETTER else -1
    rows.sort(key=lambda row: (-row["ratio"], sign * row[main]["mean"]))
    unmeasured = {*LABELS, "perplexity", "bits_per_byte"}
    evaluation = {key: value for key, value in dense["quality"].items() if key not in unmeasured}
    figures = {key: _over_seeds([column.of(dense)]) for key, column in by_key.items()}
    return {"kind": kind, "evaluation": evaluation, "dense": {**dense, "row": figures}, "rows": rows}


def _over_seeds(values: Sequence[float]) -> dict[str, float]:
    return {"mean": math.fsum(values) / len(values), "low": min(values), "high": max(values)}


def write(result: Result, folder: Path) -> None:
    """Write the three files of a comparison into an existing folder."""
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    for name, content in (("compare.json", text), ("compare.html", page(result)), ("compare.md", markdown(result))):
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


def table(result: Result, ratio: float, spread: bool = True) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of one ratio as text, best first, dense last; `spread` adds low–high over seeds."""
    shown = {key: column for key, column in columns(result["kind"]).items() if key in _shown(result)}
    rows = [
        [method_of(row["method"]).title, *(figure(row[key], spread) for key in shown)]
        for row in result["rows"]
        if row["ratio"] == ratio
    ]
    dense = result["dense"]["row"]
    rows.append(["dense", *(figure(dense[key], spread) for key in shown)])
    return ["method", *(column.label for column in shown.values())], rows


def _shown(result: Result) -> tuple[str, ...]:
    sizes = ("stored_ratio", "bytes_ratio") if _differ_in_bits(result) else ("stored_ratio",)
    return (*sizes, "mac_ratio", "whitened_loss", *QUALITY[result["kind"]])


def _differ_in_bits(result: Result) -> bool:
    """Return True if bytes differ from stored parameters, because methods use different numbers of bits."""
    return any(row["bytes_ratio"]["mean"] < 0.9 * row["stored_ratio"]["mean"] for row in result["rows"])


def figure(values: Mapping[str, float], spread: bool = True) -> str:
    """Format the mean over seeds; `spread` adds the lowest and highest where they differ in print."""
    mean, low, high = (formatting.number(values[key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low}–{high})" if spread and low != high else mean


def terminal_table(result: Result, ratio: float) -> tuple[list[str], list[list[str]]]:
    """Return `table` in a narrower form, with low–high over the draws in a column of its own for the main metric."""
    main = QUALITY[result["kind"]][0]
    headings, rows = table(result, ratio, spread=False)
    place = headings.index(LABELS[main]) + 1
    members = [row for row in result["rows"] if row["ratio"] == ratio]
    ranges = [formatting.spread((row[main]["low"], row[main]["high"])) if row["seeds"] > 1 else "" for row in members]
    rows = [[*row[:place], span, *row[place:]] for row, span in zip(rows, [*ranges, ""], strict=True)]
    return [*headings[:place], "over draws", *headings[place:]], rows


def markdown(result: Result) -> str:
    """Return the tables as Markdown, with the circumstances and the command that reproduces them."""
    lines = [f"# {result['source']}, compared", "", _circumstances(result), ""]
    for ratio in result["ratios"]:
        headings, rows = table(result, ratio)
        lines += [f"## Stored FFN ratio {ratio:g}", "", _row(headings), _row(["---"] * len(headings))]
        lines += [*map(_row, rows), ""]
    return "\n".join([*lines, "```sh", result["command"], "```", ""])


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _circumstances(result: Result) -> str:
    seeds, calibration, evaluation = len(result["seeds"]), result["calibration"], result["evaluation"]
    amount = f"{formatting.number(evaluation['texts'])} texts" if "texts" in evaluation else ""
    amount = amount or f"{formatting.number(evaluation['tokens'])} tokens"
    drawn = f", mean (lowest–highest) of {seeds} calibration draws" if seeds > 1 else ", one calibration draw"
    unit = "blocks" if result["kind"] == "causal" else "texts"
    return (
        f"Calibrated on {formatting.number(calibration['texts'])} {unit} of {calibration['data']} "
        f"({formatting.number(calibration['tokens'])} tokens), evaluated on {amount} of {evaluation['data']}{drawn}. "
        "No training. Ratios are of the FFN alone; stored parameters include biases, and each method is counted in the "
        f"form that it would store. Whitened loss: {formatting.WHITENED_LOSS}."
    )


def page(result: Result) -> str:
    """Return the comparison as one self-contained page: no script, nothing loaded from elsewhere."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"colour": lambda name: method_of(name).curve.style.colour}
    source = (
        resources.files("pilon_compress.report").joinpath("templates/comparison.html.j2").read_text(encoding="utf-8")
    )
    main = QUALITY[result["kind"]][0]
    curves = {curve.name: curve for curve in (method_of(name).curve for name in result["methods"])}
    return environment.from_string(source).render(
        result=result,
        lead=_lead(result),
        better="lower" if main in LESS_IS_BETTER else "higher",
        plots=[(LABELS[key], _plot(result, key), key in LESS_IS_BETTER) for key in PLOTTED[result["kind"]]],
        tables=[(ratio, *_with_keys(result, ratio)) for ratio in result["ratios"]],
        methods=[(curve.title, curve.about) for curve in curves.values() if curve.about],
        sorted_by=LABELS[main],
        circumstances=_circumstances(result),
    )


def _plot(result: Result, key: str) -> Markup:
    return Markup(frontier_plot.frontier(result["rows"], key, LABELS[key], result["dense"]["row"][key]["mean"]))


def _lead(result: Result) -> str:
    """Return a sentence per ratio on the best method, or on the first two if their draws overlap."""
    main, bits = QUALITY[result["kind"]][0], _differ_in_bits(result)
    cost, unit = ("bytes_ratio", "bytes") if bits else ("mac_ratio", "MACs")

    def described(row: Mapping[str, Any]) -> str:
        quality, spent = figure(row[main], spread=False), figure(row[cost], spread=False)
        return f"{method_of(row['method']).title} ({quality} at {spent} of the {unit})"

    sentences = ["Methods differ in bits per parameter, so compare them by bytes."] if bits else []
    for ratio in result["ratios"]:
        best, *others = [row for row in result["rows"] if row["ratio"] == ratio]
        part = f"At {ratio:g}" if ratio < 1 else "With all"
        text = f"{part} of the FFN’s parameters, by {LABELS[main]}: "
        if others and best["seeds"] > 1 and _overlap(best[main], others[0][main]):
            text += f"{described(best)} and {described(others[0])} are level over the calibration draws"
        else:
            text += f"{described(best)} leads" + (f", then {described(others[0])}" if others else "")
        sentences.append(text + ".")
    return " ".join(sentences)


def _overlap(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one["low"] <= other["high"] and other["low"] <= one["high"]


def _with_keys(result: Result, ratio: float) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the table of one ratio with each row's method key, which decides its colour."""
    headings, rows = table(result, ratio)
    keys = [row["method"] for row in result["rows"] if row["ratio"] == ratio]
    return headings, list(zip([*keys, "dense"], rows, strict=True))
