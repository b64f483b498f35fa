"""Plot the speedups of a benchmark as inline SVG."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np

from pilon_compress.report.formatting import number
from pilon_compress.report.plot_style import INK, QUIET, RULE, STYLE, method_colour, panels, svg


def speedups(
    parts: Mapping[str, Mapping[str, Mapping[str, Any]]],
    label: str = "speedup over dense fp32 torch",
    title: str = "Speedup of every variant over the dense model in float32",
) -> str:
    """Plot the speedup of every variant, with its spread: one panel per title of `parts`.

    label: of the axis   title: of the whole, for readers that do not see it
    """
    count = max(len(entries) for entries in parts.values())
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(parts), (0.34 * count + 0.9) * len(parts), 1)
        for axis, (heading, entries) in zip(axes, parts.items(), strict=True):
            names, values = list(entries), [entry["speedup"] for entry in entries.values()]
            low, high = zip(*(entry["spread"] for entry in entries.values()), strict=True)
            errors = [np.subtract(values, low).clip(0), np.subtract(high, values).clip(0)]
            colours = [method_colour("pilon") if name.startswith("pilon") else RULE for name in names]
            axis.barh(names, values, xerr=errors, color=colours, ecolor=INK, capsize=3, height=0.7)
            for row, (value, end) in enumerate(zip(values, high, strict=True)):
                axis.text(max(value, end), row, f"  {number(value)}x", va="center")
            axis.axvline(1, color=QUIET, linewidth=0.8)
            axis.invert_yaxis()
            axis.set_title(heading)
            axis.margins(x=0.1)
        axes[-1].set_xlabel(label)
        return svg(figure, "speedups", title)
