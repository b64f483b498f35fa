"""Format figures for people: three significant digits, thousands separators, MiB; labels and meanings of metrics.

Report pages, model cards and the command line use it, so that they agree.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

METHOD_NAMES = {"pilon": "PILON", "whitened-svd": "whitened SVD", "svd": "plain SVD"}
ROLE_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
NONE = "–"


def number(value: float | None) -> str:
    """Format three significant digits, with thousands separators from 1,000 on.

    Values close to 1 get up to six decimals where three would round to 1. None (not measured) is a dash; infinite and
    undefined values are "not finite".
    """
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if isinstance(value, int) or size >= 999.5:
        return f"{value:,.0f}"
    if size == 0:
        return "0"
    if size < 1e-4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, 2 - math.floor(math.log10(float(f"{size:.2e}"))))
    texts = [f"{value:.{d}f}" for d in (decimals, *range(3, 7))]
    exact = [text for text in texts if abs(float(text)) != 1]
    return exact[0] if exact and size != 1 else texts[0]


def short_count(value: float) -> str:
    """Format a count with its unit letter: 950, 12.3 K, 7.08 M, 1.24 B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{number(value / unit)} {letter}"
    return number(value)


def mib(n_bytes: float) -> str:
    """Format bytes in MiB (2**20 bytes)."""
    return f"{number(n_bytes / 2**20)} MiB"


def spread(values: Iterable[float | None]) -> str:
    """Format `smallest–largest`, or one value if these are equal in print."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return NONE
    low, high = number(known[0]), number(known[-1])
    return low if low == high else f"{low}–{high}"


def layer_list(layers: Sequence[int]) -> str:
    """Format layer numbers with runs joined: `0–2, 5`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def in_order(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Return the distinct `names`: those in `first` in that order, then the others sorted."""
    distinct = set(names)
    return [name for name in first if name in distinct] + sorted(distinct - set(first))


WHITENED_LOSS = (
    "mean over the replaced projections of the squared error of their outputs ÷ their squared outputs, on the "
    "calibration text, each output less its mean where a bias compensates for that"
)


def method_name(method: str) -> str:
    """Return the name of a method in running text."""
    return METHOD_NAMES.get(method, method)


class Metric(NamedTuple):
    """A measured value: label, printed value, meaning (with its denominator), and the dense model's printed value."""

    label: str
    value: str
    meaning: str
    dense: str = ""


class Ratio(NamedTuple):
    """A cost ratio, compressed over dense, of one part of the model: see `parts_of`."""

    label: str
    part: str
    value: float
    meaning: str
    detail: str


STORED, BYTES, BYTES_BF16, MACS = "Stored parameters", "Bytes on disk", "Bytes, dense in bfloat16", "MACs per token"


def parts_of(report: Mapping[str, Any], model: str = "model") -> list[tuple[str, str]]:
    """Return (key, label) of the parts of a model whose sizes a report has; those of all of it are at the key `model`.

    That is the FFN, attention where it is replaced, and both together.
    """
    named = [("ffn", "FFN"), ("attention", "attention"), ("other", "other projections"), ("replaced_size", "replaced")]
    found = [(key, name) for key, name in named if report.get(key) and report[key].get("dense_stored") != 0]
    if len(found) == 2 and found[-1][0] == "replaced_size":  # the same as the one before it
        found.pop()
    return [*found, (model, "whole model")] if report.get(model) else found


def replaced_of(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name of all that is replaced, as in `FFN and attention`, and its sizes."""
    names = [name for key, name in parts_of(report) if key not in ("replaced_size", "model")]
    return " and ".join(names), report.get("replaced_size") or report["ffn"]


def ratios(report: Mapping[str, Any]) -> list[Ratio]:
    """Return the cost ratios of a report: stored parameters, bytes and MACs, each of all `parts_of` it.

    Bytes are over the dense file in its own dtype, and also over bfloat16 where that is another dtype.
    """
    source = report.get("source_dtype", "bfloat16")  # reports before `source_dtype` count the dense model in bfloat16
    shown = [STORED, BYTES, MACS] if source == "bfloat16" else [STORED, BYTES, BYTES_BF16, MACS]
    by_part = [_part_ratios(report, key, part, source) for key, part in parts_of(report)]
    return [ratios_of_part[label] for label in shown for ratios_of_part in by_part]


def _part_ratios(report: Mapping[str, Any], key: str, part: str, source: str) -> dict[str, Ratio]:
    """Return the cost ratios of one part of the model by label; `source`: the dense file's dtype."""
    sizes = report[key]
    saved, dense = f"bytes saved to disk as {report['dtype']} ÷ bytes of the dense {part} in", mib(sizes["dense_bytes"])
    source_bytes = mib(sizes.get("source_bytes", sizes["dense_bytes"]))
    rows = (
        (
            STORED,
            sizes["stored_ratio"],
            f"parameters kept ÷ parameters of the dense {part}",
            f"{short_count(sizes['stored'])} of {short_count(sizes['dense_stored'])}",
        ),
        (
            BYTES,
            sizes.get("bytes_ratio_to_source", sizes["bytes_ratio"]),
            f"{saved} {source}",
            f"{mib(sizes['bytes'])} of {source_bytes}",
        ),
        (BYTES_BF16, sizes["bytes_ratio"], f"{saved} bfloat16", f"{mib(sizes['bytes'])} of {dense}"),
        (
            MACS,
            sizes["mac_ratio"],
            f"multiply-accumulates per token ÷ those of the dense {part}",
            f"{short_count(sizes['macs'])} of {short_count(sizes['dense_macs'])}",
        ),
    )
    return {label: Ratio(label, part, value, meaning, detail) for label, value, meaning, detail in rows}


# key -> (label, meaning, key of the dense model's figure)
QUALITY = {
    "perplexity_ratio": ("Perplexity ratio", "perplexity ÷ perplexity of the dense model; 1 is lossless", ""),
    "perplexity": ("Perplexity", "exp of the mean loss per token", "dense_perplexity"),
    "bits_per_byte": ("Bits per byte", "loss in bits ÷ bytes of text", "dense_bits_per_byte"),
    "kl": ("KL divergence", "mean nats per token, KL(dense ‖ compressed); 0 is lossless", ""),
    "top1_agreement": ("Top-1 agreement", "share of tokens where both models rank the same token first", ""),
    "cosine": ("Cosine to dense", "mean cosine between dense and compressed text embeddings; 1 is lossless", ""),
    "neighbors10": ("Neighbours kept", "share of the 10 nearest texts that are the same as with the dense model", ""),
}
_CIRCUMSTANCES = {
    "data": "Text",
    "kind": "Kind of model",
    "texts": "Texts",
    "tokens": "Tokens",
    "bytes": "Bytes of text",
    "window": "Window, tokens",
    "stride": "Stride, tokens",
    "begins_with": "Sequences begin with",
    "eos": "EOS between documents",
    "skipped": "Feed-forward work skipped at exit gates",
    "skipped_by_layer": "Tokens that skip, by layer",
}
_DENSE_KEYS = {dense for _, _, dense in QUALITY.values() if dense}


def quality(evaluation: Mapping[str, Any] | None) -> list[Metric]:
    """Return the measured quality metrics, the most important first; [] without an evaluation."""
    measured = evaluation or {}
    figures = []
    for key, (label, meaning, dense_key) in QUALITY.items():
        if measured.get(key) is not None:
            dense = measured.get(dense_key)
            figures.append(Metric(label, number(measured[key]), meaning, "" if dense is None else number(dense)))
    return figures


def circumstances(details: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return (label, value) of every entry of a calibration or evaluation that is not a quality metric."""
    rows = []
    for key in in_order(details or {}, list(_CIRCUMSTANCES)):
        value = (details or {})[key]
        if key == "begins_with" and value is None:
            value = "text, no token before it"
        if key in QUALITY or key in _DENSE_KEYS or value is None:
            continue
        if isinstance(value, bool):
            value = "yes" if value else "no"
        values = value if isinstance(value, list) else [value]
        text = ", ".join(number(one) if isinstance(one, int | float) else str(one) for one in values)
        rows.append((_CIRCUMSTANCES.get(key, key.replace("_", " ")), text))
    return rows
