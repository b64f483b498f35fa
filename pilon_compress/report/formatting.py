"""Figures as a person reads them: three significant digits, thousands separators, MiB, and what is over what.

The report page and the model card say the same things about one report; both take words and digits from here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

METHOD_NAMES = {"pilon": "PILON", "whitened-svd": "whitened SVD", "svd": "plain SVD"}
ROLE_ORDER = ("gate", "up", "down")
NONE = "–"


def number(value: float | None) -> str:
    """Three significant digits; thousands separators from 1,000 on; up to six decimals where three would round to 1.

    `None` (not measured) is a dash, and an infinite or undefined figure says so.
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
    """A count with its unit letter: 950, 12.3 K, 7.08 M, 1.24 B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{number(value / unit)} {letter}"
    return number(value)


def mib(n_bytes: float) -> str:
    """A size in MiB (2**20 bytes)."""
    return f"{number(n_bytes / 2**20)} MiB"


def spread(values: Iterable[float | None]) -> str:
    """One figure when all are equal as printed, else `smallest–largest`."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return NONE
    low, high = number(known[0]), number(known[-1])
    return low if low == high else f"{low}–{high}"


def layer_list(layers: Sequence[int]) -> str:
    """Layer numbers with runs joined: `0–2, 5`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def in_order(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """The distinct `names`, those of `first` in that order, the others after them sorted."""
    distinct = set(names)
    return [name for name in first if name in distinct] + sorted(distinct - set(first))


WHITENED_LOSS = (
    "mean over the FFN projections of the squared error of their outputs ÷ their squared outputs, on the calibration "
    "text, each output less its mean where a bias makes up for that"
)


def method_name(method: str) -> str:
    """How a method is called in running text."""
    return METHOD_NAMES.get(method, method)


class Figure(NamedTuple):
    """One measured figure: what it is called, its printed value, what it is over what, and the dense model's value."""

    label: str
    value: str
    meaning: str
    dense: str = ""


class Ratio(NamedTuple):
    """One cost ratio, compressed over dense, for one part of the model (`FFN` or `whole model`)."""

    label: str
    part: str
    value: float
    meaning: str
    detail: str


STORED, BYTES, BYTES_BF16, MACS = "Stored parameters", "Bytes on disk", "Bytes, dense in bfloat16", "MACs per token"


def ratios(report: Mapping[str, Any]) -> list[Ratio]:
    """The cost ratios of a report: stored, bytes and MACs, each for the FFN and for the whole model.

    Bytes are over the dense file in its own dtype, and where that is another one, over bfloat16 as well.
    """
    source = report.get("source_dtype", "bfloat16")  # older reports count the dense model in bfloat16 alone
    found = []
    for key, part in (("ffn", "FFN"), ("model", "whole model")):
        sizes = report[key]
        found += [
            Ratio(
                STORED,
                part,
                sizes["stored_ratio"],
                f"parameters kept ÷ parameters of the dense {part}",
                f"{short_count(sizes['stored'])} of {short_count(sizes['dense_stored'])}",
            ),
            Ratio(
                BYTES,
                part,
                sizes.get("bytes_ratio_to_source", sizes["bytes_ratio"]),
                f"bytes saved to disk as {report['dtype']} ÷ bytes of the dense {part} in {source}",
                f"{mib(sizes['bytes'])} of {mib(sizes.get('source_bytes', sizes['dense_bytes']))}",
            ),
            Ratio(
                BYTES_BF16,
                part,
                sizes["bytes_ratio"],
                f"bytes saved to disk as {report['dtype']} ÷ bytes of the dense {part} in bfloat16",
                f"{mib(sizes['bytes'])} of {mib(sizes['dense_bytes'])}",
            ),
            Ratio(
                MACS,
                part,
                sizes["mac_ratio"],
                f"multiply-accumulates per token ÷ those of the dense {part}",
                f"{short_count(sizes['macs'])} of {short_count(sizes['dense_macs'])}",
            ),
        ]
    shown = [STORED, BYTES, MACS] if source == "bfloat16" else [STORED, BYTES, BYTES_BF16, MACS]
    return sorted((ratio for ratio in found if ratio.label in shown), key=lambda ratio: shown.index(ratio.label))


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
}
_DENSE_KEYS = {dense for _, _, dense in QUALITY.values() if dense}


def quality(evaluation: Mapping[str, Any] | None) -> list[Figure]:
    """The quality figures that were measured, most telling first; none where there was no evaluation."""
    measured = evaluation or {}
    figures = []
    for key, (label, meaning, dense_key) in QUALITY.items():
        if measured.get(key) is not None:
            dense = measured.get(dense_key)
            figures.append(Figure(label, number(measured[key]), meaning, "" if dense is None else number(dense)))
    return figures


def circumstances(details: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """On what calibration or evaluation ran: (label, value) for every entry that is not a quality figure."""
    rows = []
    for key in in_order(details or {}, list(_CIRCUMSTANCES)):
        value = (details or {})[key]
        if key == "begins_with" and value is None:
            value = "text, no token before it"
        if key in QUALITY or key in _DENSE_KEYS or value is None:
            continue
        if isinstance(value, bool):
            value = "yes" if value else "no"
        text = number(value) if isinstance(value, int | float) else str(value)
        rows.append((_CIRCUMSTANCES.get(key, key.replace("_", " ")), text))
    return rows
