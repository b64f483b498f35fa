"""Write the sections of model cards: sentences and tables about the figures of a report."""

from collections.abc import Mapping
from typing import Any

from pilon_compress.config.training import TrainRecipe
from pilon_compress.report import formatting
from pilon_compress.report.markdown import cell, code, table
from pilon_compress.report.training_page import main_metric

Report = Mapping[str, Any]
METHODS = {
    "pilon": "by PILON: a block keeps the neurons that the others cannot replace, and each projection is one dense "
    "matrix, or a composition of low-rank primitives from a bank, its own or one that a band of layers shares",
    "whitened-svd": "by a low-rank product per layer, cut by SVD after whitening with the calibration inputs",
    "svd": "by a low-rank product per layer, cut by plain SVD of the weights",
}
SLICES = (
    "by experts without training: a block keeps its neurons in slices of equal size, of which {active} of {experts} "
    "compute a token; the shared ones always, the others as a router chooses"
)
OVER = {
    formatting.STORED: "parameters kept ÷ parameters of the dense model",
    formatting.BYTES: "bytes saved as {dtype} ÷ bytes of the dense model in {source}",
    formatting.BYTES_BF16: "bytes saved as {dtype} ÷ bytes of the dense model in bfloat16",
    formatting.MACS: "multiply-accumulates per token ÷ those of the dense model",
}


def introduction(report: Report) -> str:
    """Describe the replaced projections of a converted model and the method."""
    layers = {layer for bank in report["plan"]["banks"] for layer in bank["layers"]}
    roles = formatting.in_order((bank["role"] for bank in report["plan"]["banks"]), formatting.ROLE_ORDER)
    how = METHODS.get(report["method"], f"by {code(report['method'])}")
    if report.get("slices"):
        part = report["plan"]["banks"][0]
        how = SLICES.format(active=part["active"], experts=part["experts"])
    where = f"({cell(', '.join(roles))}) of {len(layers)} layers"
    names, plan = formatting.replaced_of(report)[0], report["plan"]
    return (
        f"{code(report['source'])} with the {names} projections {where} replaced {how}. "
        f"Everything else is the dense model's. Requested {names} ratio: {formatting.number(plan['ratio'])}. "
        "The full report is `report.html`, its numbers are in `report.json`."
    )


def costs(report: Report) -> str:
    """Return a table of stored parameters, bytes and MACs over the dense model's, of what is replaced and of all."""
    ratios = formatting.ratios(report)
    rows = []
    for label in dict.fromkeys(ratio.label for ratio in ratios):
        cells = [f"**{formatting.number(one.value)}** ({one.detail})" for one in ratios if one.label == label]
        dtypes = {"dtype": report["dtype"], "source": report.get("source_dtype", "bfloat16")}
        rows.append([label, *cells, OVER[label].format(**dtypes)])
    parts = [name[:1].upper() + name[1:] for _, name in formatting.parts_of(report)]
    return table(["Compressed ÷ dense", *parts, "Meaning"], rows)


def quality(report: Report) -> list[str]:
    """Return a table of the quality metrics beside the dense model's, and the circumstances of the evaluation."""
    figures = formatting.quality(report["evaluation"])
    if not figures:
        return ["Quality was **not measured**: this conversion ran without an evaluation."]
    rows = [[f.label, f"**{f.value}**", f.dense or formatting.NONE, f.meaning] for f in figures]
    return [
        table(["Quality", "This model", "Dense model", "Meaning"], rows),
        f"Measured on: {facts(report['evaluation'])}.",
    ]


def facts(details: Mapping[str, Any] | None) -> str:
    """Return the circumstances of a measurement in one line."""
    rows = formatting.circumstances(details)
    return "; ".join(f"{label if label[:3].isupper() else label.lower()} {code(value)}" for label, value in rows)


def losses(report: Report) -> list[str]:
    """Return a table of the whitened loss of the method and of the baselines; of experts the error of their blocks."""
    if blocks := report.get("slices"):
        mean = sum(block["relative_error"] for block in blocks) / len(blocks)
        return [
            f"Of the squares of a block's output, tokens lose **{formatting.number(mean)}** (mean over {len(blocks)} "
            f"blocks, each at the dense model's inputs; {facts(report['calibration'])})."
        ]
    order = [report["method"], *formatting.METHOD_NAMES]
    rows = []
    for method in formatting.in_order(report["whitened_loss"], list(dict.fromkeys(order))):
        name, value = cell(formatting.method_name(method)), formatting.number(report["whitened_loss"][method])
        used = method == report["method"]
        rows.append([f"{name} (this model)" if used else name, f"**{value}**" if used else value])
    return [
        table(["Method", "Whitened loss"], rows),
        f"Whitened loss: {formatting.WHITENED_LOSS} ({facts(report['calibration'])}); 0 is the dense model.",
    ]


def limits(report: Report) -> list[str]:
    """Return the limits of the figures of a converted model, a sentence each."""
    measured = bool(formatting.quality(report["evaluation"]))
    lines = [
        "The quality figures hold for the text named above; other languages, domains and tasks were not measured."
        if measured
        else "Quality was not measured: measure it on your own text before use.",
        "Errors of blocks and whitened loss are measured on the calibration text itself; they do not measure quality.",
        "Loading needs the Python package `pilon_compress`.",
        "Licence, training data, biases and intended use are those of the dense model; see its own card.",
    ]
    heavier = [name for key, name in formatting.parts_of(report) if (report[key]["mac_ratio"] or 0) > 1]
    if heavier:
        lines.insert(
            1, f"It stores less than it computes: MACs per token are above dense for the {' and the '.join(heavier)}."
        )
    return lines + [cell(line) for line in report.get("notes", [])]


def training_figures(result: Report) -> list[list[str]]:
    """Return rows (name, value, meaning) of a training's figures."""
    figure, parts = main_metric(result), formatting.parts_of(result)
    tokens, steps = formatting.short_count(result["tokens"]), formatting.number(result["steps"])
    rows = [
        [figure.label, f"**{figure.value}**", figure.meaning],
        ["Trained on", f"{tokens} tokens", f"{steps} steps"],
        ["Parameters", formatting.short_count(result["parameters"]), "of the whole model"],
    ]
    for key, label in (("stored", "Stored parameters"), ("bytes", "Bytes"), ("mac", "MACs per token")):
        known = [(name, result[part].get(f"{key}_ratio")) for part, name in parts]
        (first, value), *others = [(name, formatting.number(ratio)) for name, ratio in known if ratio is not None]
        more = "".join(f", of the {name} {ratio}" for name, ratio in others)
        rows.append([f"{label} ÷ dense", f"**{value}**", f"of the {first}{more}"])
    if exits := result.get("exits"):
        meaning = f"of the FFN, at exit gates: perplexity {exits['perplexity_increase']:+.2%}, measured with all gates"
        rows.append(["Work skipped", f"**{exits['skipped']:.1%}**", meaning])
    return rows


def training_limits(result: Report, recipe: TrainRecipe) -> list[str]:
    """Return the limits of the figures of a trained model, a sentence each."""
    lines = [
        "The perplexity holds for the text named above; other languages, domains and tasks were not measured.",
        "It was trained on that text, in addition to the text of the model that it started from, with all their "
        "errors and biases.",
    ]
    if recipe.ternary.enabled:
        lines.append(
            "The folder stores the latent weights behind the ternary ones, so it is as large as a float model. Its "
            "feed-forward part computes with a ternary weight -1, 0 or 1 for each, and a few scales."
        )
    heavier = [name for key, name in formatting.parts_of(result) if key != "model" and result[key]["mac_ratio"] > 1]
    if heavier:
        lines.append(f"Its {heavier[0]} stores less than it computes: MACs per token are above dense.")
    return lines
