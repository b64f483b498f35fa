"""Plot the curves of a training from its metrics.jsonl: inline SVG for the page, PNG for the card."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pilon_compress.report import plot_style
from pilon_compress.report.formatting import short_count

Line = Mapping[str, Any]
Mark = tuple[float, str]
COLOURS = {
    "banks": "#0072B2",
    "compositions": "#E69F00",
    "scales": "#D55E00",
    "embeddings": "#009E73",
    "matrices": "#CC79A7",
    "vectors": "#56B4E9",
    "routers": "#111827",
}
EVALUATED = {"val_perplexity": "validation perplexity", "val_cosine": "cosine to the teacher"}
USE = {
    "utilisation": ("selected by a layer", "#0072B2"),
    "dead_share": ("dead", "#D55E00"),
    "composition_entropy": ("entropy within a layer", "#E69F00"),
    "primitive_entropy": ("entropy over the bank", "#009E73"),
    "primitive_gini": ("Gini over the bank", "#CC79A7"),
    "router_entropy": ("entropy of a router", "#8C564B"),
    "expert_similarity": ("cosine of experts", "#7F7F7F"),
    "zero_share": ("weights 0", "#111827"),
    "flipped_share": ("weights changed", "#56B4E9"),
}
QUIET, MAIN, GRID = "#a9c7de", "#0072B2", "#e5e7eb"
SMOOTHED = 40  # lines; with more of them, a running mean is drawn over the values
DPI = 150


def svg(lines: Sequence[Line], marks: Sequence[Mark] = ()) -> str:
    """Return the figure as an `<svg>` element. `marks`: (tokens, label) of changes during the training."""
    with matplotlib.rc_context(plot_style.STYLE):
        return _svg(_figure(lines, marks))


def png(lines: Sequence[Line], marks: Sequence[Mark] = ()) -> bytes:
    """Return the figure as a PNG; equal lines give equal bytes."""
    with matplotlib.rc_context(plot_style.STYLE):
        return _png(_figure(lines, marks))


def both(lines: Sequence[Line], marks: Sequence[Mark] = ()) -> tuple[str, bytes]:
    """Return what `svg` and `png` return, from one figure: its layout takes as long as drawing it."""
    with matplotlib.rc_context(plot_style.STYLE):
        figure = _figure(lines, marks)
        return _svg(figure), _png(figure)


def _svg(figure: Figure) -> str:
    return plot_style.svg(figure, "curves", "Loss, perplexity, rates and bank diagnostics over the training")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    plot_style.lay_out(figure).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _figure(lines: Sequence[Line], marks: Sequence[Mark]) -> Figure:
    drawn = [draw for draw in (_loss, _metric, _use, _norms, _rate, _speed) if _has(draw, lines)]
    figure, axes = plot_style.panels(max(1, len(drawn)), 2.7 * math.ceil(max(1, len(drawn)) / 2), 2)
    figure.set_layout_engine("constrained", h_pad=0.11, w_pad=0.12)
    for axis, draw in zip(axes, drawn, strict=False):
        draw(axis, lines)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axis.xaxis.set_major_formatter(FuncFormatter(_count))
        axis.set_xlim(left=0)
        for place, _ in marks:
            axis.axvline(place, color="#9ca3af", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for place, label in marks if drawn else ():
        top = axes[0].get_xaxis_transform()  # tokens across, share of the height up
        axes[0].annotate(label, (place, 1), (4, -1), top, "offset points", color="#6b7280", fontsize=8, va="top")
    for axis in axes[max(0, len(drawn) - 2) : len(drawn)]:
        axis.set_xlabel("tokens")
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    return figure


def _points(lines: Sequence[Line], key: str) -> tuple[list[float], list[float]]:
    """Return (tokens, values) of the lines in which `key` is finite."""
    points = [(line["tokens"], line[key]) for line in lines if plot_style.is_drawable(line.get(key))]
    return [tokens for tokens, _ in points], [value for _, value in points]


def _has(draw: Callable[[Axes, Sequence[Line]], None], lines: Sequence[Line]) -> bool:
    keys: dict[Any, list[str]] = {
        _loss: ["loss"],
        _metric: list(EVALUATED),
        _rate: ["rate"],
        _speed: ["tokens_per_second"],
    }
    drawn = keys.get(draw) or (list(USE) if draw is _use else ["gradient_norm"])
    return any(key in line for key in drawn for line in lines)


def _loss(axis: Axes, lines: Sequence[Line]) -> None:
    axis.set_title("training loss, nats per token")
    places, values = _points(lines, "loss")
    if len(values) <= SMOOTHED:
        axis.plot(places, values, color=MAIN, linewidth=1.6)
        return
    axis.plot(places, values, color=QUIET, linewidth=0.9)
    axis.plot(places, smoothed(values, len(values) // 20), color=MAIN, linewidth=1.8)


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and its neighbours, up to `width` and equally many on either side."""
    means = []
    for index in range(len(values)):
        reach = min(width, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _metric(axis: Axes, lines: Sequence[Line]) -> None:
    key = next(key for key in EVALUATED if any(key in line for line in lines))
    axis.set_title(EVALUATED[key])
    places, values = _points(lines, key)
    axis.plot(places, values, color=MAIN, linewidth=1.6, marker="o" if len(values) <= SMOOTHED else "", markersize=3.5)
    if values and max(values) > 4 * min(values):
        plot_style.log_axis(axis, min(values), max(values))
    if values:
        place = (places[-1], values[-1])
        axis.annotate(
            f"{values[-1]:.4g}", place, (0, 8), textcoords="offset points", ha="center", fontsize=9, weight="bold"
        )


def _use(axis: Axes, lines: Sequence[Line]) -> None:
    axis.set_title("use of the primitives")
    for key, (label, colour) in USE.items():
        places, values = _points(lines, key)
        if values:
            axis.plot(places, values, color=colour, linewidth=1.6, label=label)
    axis.set_ylim(-0.03, 1.03)
    _legend(axis, 3)


def _norms(axis: Axes, lines: Sequence[Line]) -> None:
    axis.set_title("norm of the gradients, before clipping")
    top: list[float] = []
    for group, colour in COLOURS.items():
        places, values = _points(lines, f"gradient_norm_{group}")
        if values:
            axis.plot(places, values, color=colour, linewidth=1.3, label=group)
            top += [value for value in values if value > 0]
    if top:
        plot_style.log_axis(axis, max(min(top), 1e-4 * max(top)), max(top))
    _legend(axis, 3)


def _rate(axis: Axes, lines: Sequence[Line]) -> None:
    axis.set_title("learning rate ÷ its highest")
    axis.plot(*_points(lines, "rate"), color=MAIN, linewidth=1.6)
    axis.set_ylim(0, 1.05)


def _speed(axis: Axes, lines: Sequence[Line]) -> None:
    axis.set_title("tokens per second")
    places, values = _points(lines, "tokens_per_second")
    axis.plot(places, values, color=MAIN, linewidth=1.2)
    axis.set_ylim(0, 1.08 * max(values, default=1.0))
    axis.yaxis.set_major_formatter(FuncFormatter(_count))


def _count(value: float, _: int) -> str:
    """Format a tick: 25 K instead of the 25.0 K of running text."""
    amount, _space, unit = short_count(value).partition(" ")
    return f"{float(amount.replace(',', '')):g} {unit}".strip()


def _legend(axis: Axes, columns: int) -> None:
    """Draw the legend between title and panel, so that all panels are equally wide."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        rows = math.ceil(len(labels) / columns)
        axis.set_title(axis.get_title(loc="left"), pad=6 + 13.5 * rows)
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.99), "ncols": columns}
        axis.legend(handles, labels, **place, fontsize=8.5, handlelength=1.2, columnspacing=1.2, borderaxespad=0.1)
