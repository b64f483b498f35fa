"""Style and building blocks of all plots: inline SVG without display or dates, equal bytes for equal figures.

Every method has one colour (Okabe and Ito's colour-blind-safe set) and one marker everywhere. Fonts are drawn as paths,
so that pages look the same on every machine.
"""

import io
import math
import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pilon_compress.report.methods import reference

INK, QUIET, RULE = "#1f2937", "#6b7280", "#d1d5db"
WIDTH = 10.4  # inches of the page's text column, so that a point of type is a point on screen
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "pilon-compress",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs everywhere
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": QUIET,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,  # names come from models, where a dollar sign is not a formula
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "image.composite_image": False,
}


def method_colour(method: str) -> str:
    """Return the colour of a method in every plot and table."""
    return reference(method).colour


def is_drawable(value: float | None) -> bool:
    """Return True for a finite value."""
    return value is not None and math.isfinite(value)


def panels(count: int, height: float, columns: int, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as the page with `count` panels in `columns`; `height` in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False, sharey=share_y)
    return figure, list(grid.flat)


def lay_out(figure: Figure) -> Figure:
    """Place the panels of a figure that is complete, and return it. Saving then draws once: with its layout engine on,
    matplotlib draws a figure for the layout and again for the file."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(None)
    return figure


def log_axis(axis: Axes, low: float, high: float) -> None:
    """Make the y axis logarithmic with plain numbers; ticks also at 2 and 5 where powers of ten would be too few."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low / 1.5, high * 1.6)


def svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an `<svg>` element: scalable, with ids that begin with `name`, loading nothing."""
    buffer = io.StringIO()
    lay_out(figure).savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # Two decimals of a point are finer than a screen shows, and halve the size of the page.
    return re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
