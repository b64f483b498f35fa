"""Plot the frontier of a comparison: quality over cost, one line per method."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from pilon_compress.report import plot_style
from pilon_compress.report.formatting import in_order
from pilon_compress.report.methods import DENSE, REFERENCES, Curve, method_of

Row = Mapping[str, Any]
COSTS = {"bytes_ratio": "FFN bytes ÷ dense", "mac_ratio": "FFN MACs per token ÷ dense"}


def frontier(rows: Sequence[Row], key: str, label: str, dense: float) -> str:
    """Return an inline SVG of the metric `key` of every row over bytes and over MACs, bars from low to high seed.

    `label` names the metric, `dense` is the dense model's value.
    """
    curves = {curve.name: curve for curve in (method_of(row["method"]).curve for row in rows)}
    order = in_order(curves, list(REFERENCES))
    values = [row[key][end] for row in rows for end in ("low", "high")]
    with matplotlib.rc_context(plot_style.STYLE):
        figure = Figure(figsize=(plot_style.WIDTH, 4.2), layout="constrained")
        axes = list(figure.subplots(1, len(COSTS), sharey=True))
        for axis, (cost, name) in zip(axes, COSTS.items(), strict=True):
            for name in order:
                _draw(
                    axis, curves[name], [row for row in rows if method_of(row["method"]).curve.name == name], cost, key
                )
            axis.plot(1, dense, DENSE.marker, color=DENSE.colour, ms=13, label="dense", zorder=6, clip_on=False)
            axis.set_xlabel(name)
            costs = [row[cost]["mean"] for row in rows]
            axis.set_xlim(math.floor(10 * max(0.0, min(costs) - 0.04)) / 10, 1.04 * max(1.0, *costs))
            axis.grid(color="#e5e7eb", linewidth=0.8)
        axes[0].set_ylabel(label)
        if key == "perplexity_ratio" and max(values) > 5 * min(values):
            plot_style.log_axis(axes[0], min(1.0, *values), max(values))
        elif key != "perplexity_ratio":
            span = max(0.02, 1 - min(values))  # not from 0, since all values of interest are close to 1
            axes[0].set_ylim(1 - 1.08 * span, 1 + 0.06 * span)
        drawn, labels = axes[0].get_legend_handles_labels()
        handles = [
            one[0] if isinstance(one, ErrorbarContainer) else one for one in drawn
        ]  # bars would hide the markers
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, math.ceil(len(labels) / 2)))
        return plot_style.svg(figure, f"frontier-{key}", f"{label} against bytes and multiply-accumulates")


def _draw(axis: Axes, curve: Curve, rows: Sequence[Row], cost: str, key: str) -> None:
    """Draw the rows of one curve in order of cost."""
    points = sorted((row[cost]["mean"], row[key]["mean"], row[key]["low"], row[key]["high"]) for row in rows)
    x, mean, low, high = zip(*points, strict=True)
    below = [m - v for m, v in zip(mean, low, strict=True)]
    above = [v - m for m, v in zip(mean, high, strict=True)]
    axis.errorbar(
        x,
        mean,
        yerr=[[max(0.0, v) for v in below], [max(0.0, v) for v in above]],
        color=curve.style.colour,
        marker=curve.style.marker,
        linestyle=curve.style.line,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        linewidth=1.7,
        elinewidth=1.2,
        capsize=2.5,
        label=curve.title,
    )
