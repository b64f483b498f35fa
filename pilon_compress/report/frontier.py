"""The frontier of a comparison: quality against what it costs, one line per method."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from pilon_compress.nn.integer import KINDS
from pilon_compress.report import plots
from pilon_compress.report.formatting import METHOD_NAMES, in_order

Row = Mapping[str, Any]


class Look(NamedTuple):
    """How a method is drawn: colour (Okabe and Ito's set), marker, line."""

    colour: str
    marker: str
    line: str = "-"


LOOKS = {
    "pilon-refined": Look("#003f66", "D"),
    "pilon": Look("#0072B2", "o"),
    "pilon-shared": Look("#17618f", "h", "-."),
    "pilon-low-rank": Look("#56B4E9", "o", "--"),
    "nystrom": Look("#D55E00", "v"),
    "whitened-svd": Look("#E69F00", "s"),
    "basis-sharing": Look("#009E73", "P"),
    "asvd": Look("#9a6fb0", "<"),
    "svd": Look("#CC79A7", "^"),
    "original-pilon": Look("#8a8f98", "X", ":"),
    "pilon-int8": Look("#7aa6c2", "p", "-."),
    "pilon-int4": Look("#2f6f9f", "H", "-."),
    "pilon-int3": Look("#12355b", ">", "-."),
    "pilon-int2": Look("#4c5f9e", "8", "-."),
    "gptq": Look("#b5651d", "d", "--"),
    "rtn": Look("#a0522d", "D", ":"),
    "dense": Look("#1f2937", "*"),
}
NAMES = {
    **METHOD_NAMES,
    "pilon-refined": "PILON, refined",
    "pilon-shared": "PILON, shared banks",
    "pilon-low-rank": "PILON, all neurons",
    "whitened-svd": "whitened SVD (SVD-LLM)",
    "asvd": "ASVD",
    "basis-sharing": "Basis Sharing",
    "nystrom": "Nyström neurons (MoDeGPT)",
    "original-pilon": "original PILON",
    "gptq": "GPTQ",
    "rtn": "round to nearest",
}
ABOUT = {
    "pilon": "neurons, ranks and plain matrices allocated over all layers in a two-sided metric, each layer fitted "
    "behind the converted ones before it",
    "pilon-refined": "the same, then trained on unlabelled text to answer as the dense model does",
    "pilon-shared": "the same, but bands of layers share banks where a joint fit has the lower loss",
    "pilon-low-rank": "the same without dropping neurons: ranks alone are allocated",
    "svd": "each weight's nearest matrix of lower rank; knows no activations",
    "asvd": "SVD after scaling the input channels by the square root of their magnitude (Yuan et al., 2023)",
    "whitened-svd": "SVD in the metric of the inputs' second moment (SVD-LLM, Wang et al., 2024)",
    "basis-sharing": "two neighbouring layers share the input side of their factors (Wang et al., 2025)",
    "nystrom": "whole neurons are dropped and the down-projection makes up for them (MoDeGPT, Lin et al., 2025); what "
    "stays of up and gate is exact, so all of its loss is in down",
    **{
        f"pilon-{name}": f"the same with its numbers in {kind.bits} bits, rounded in the metric that it was fitted in"
        for name, kind in KINDS.items()
    },
    "gptq": "all dense weights in whole numbers; rows that are still free make up for the rounded ones, in the metric "
    "of the inputs (Frantar et al., 2023)",
    "rtn": "all dense weights in whole numbers, every one on its own; knows no activations",
    "original-pilon": "primitives from a band's mean weight, mixed by softmax top-k, no activations",
}
COSTS = {"bytes_ratio": "FFN bytes ÷ dense", "mac_ratio": "FFN MACs per token ÷ dense"}


def series(method: str) -> str:
    """The line that a method is a point of: dense weights in 8, 4, 3 and 2 bits make one, `rtn` or `gptq`."""
    stem, _, kind = method.partition("-")
    return stem if stem in ("gptq", "rtn") and kind in KINDS else method


def method_name(method: str) -> str:
    """How a method is called in tables."""
    stem, _, kind = method.partition("-")
    return f"{NAMES.get(stem, stem)}, {kind}" if kind in KINDS else NAMES.get(method, method)


def method_colour(method: str) -> str:
    """The colour that stands for a method."""
    line = series(method)
    return LOOKS[line].colour if line in LOOKS else plots.method_colour(method)


def frontier(rows: Sequence[Row], key: str, label: str, dense: float) -> str:
    """Inline SVG: the figure `key` of every row over stored bytes and over MACs, bars from lowest to highest seed."""
    lines = in_order((series(row["method"]) for row in rows), list(LOOKS))
    values = [row[key][end] for row in rows for end in ("low", "high")]
    with matplotlib.rc_context(plots._STYLE):
        figure = Figure(figsize=(plots._WIDTH, 4.2), layout="constrained")
        axes = list(figure.subplots(1, len(COSTS), sharey=True))
        for axis, (cost, name) in zip(axes, COSTS.items(), strict=True):
            for line in lines:
                _line(axis, line, [row for row in rows if series(row["method"]) == line], cost, key)
            axis.plot(1, dense, "*", color=LOOKS["dense"].colour, ms=13, label="dense", zorder=6, clip_on=False)
            axis.set_xlabel(name)
            costs = [row[cost]["mean"] for row in rows]
            axis.set_xlim(math.floor(10 * max(0.0, min(costs) - 0.04)) / 10, 1.04 * max(1.0, *costs))
            axis.grid(color="#e5e7eb", linewidth=0.8)
        axes[0].set_ylabel(label)
        if key == "perplexity_ratio" and max(values) > 5 * min(values):
            plots._log_axis(axes[0], min(1.0, *values), max(values))
        elif key != "perplexity_ratio":
            span = max(0.02, 1 - min(values))  # not from 0: what is worth comparing is close to 1
            axes[0].set_ylim(1 - 1.08 * span, 1 + 0.06 * span)
        drawn, labels = axes[0].get_legend_handles_labels()
        handles = [
            one[0] if isinstance(one, ErrorbarContainer) else one for one in drawn
        ]  # bars would hide the markers
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, math.ceil(len(labels) / 2)))
        return plots._svg(figure, f"frontier-{key}", f"{label} against bytes and multiply-accumulates")


def _line(axis: Axes, name: str, rows: Sequence[Row], cost: str, key: str) -> None:
    """The rows of one `series`, joined in order of cost."""
    points = sorted((row[cost]["mean"], row[key]["mean"], row[key]["low"], row[key]["high"]) for row in rows)
    x, mean, low, high = zip(*points, strict=True)
    look = LOOKS.get(name, Look(method_colour(name), "D"))
    below = [m - v for m, v in zip(mean, low, strict=True)]
    above = [v - m for m, v in zip(mean, high, strict=True)]
    axis.errorbar(
        x,
        mean,
        yerr=[[max(0.0, v) for v in below], [max(0.0, v) for v in above]],
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        linewidth=1.7,
        elinewidth=1.2,
        capsize=2.5,
        label=method_name(name),
    )
