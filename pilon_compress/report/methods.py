"""Register the title, the explanation and the look of the methods of a comparison.

`compare` registers one entry for every method; tables, plots and pages look names up here.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pilon_compress.plugins import Registry

OTHER_COLOURS = ("#009E73", "#56B4E9", "#D55E00")


class PlotStyle(NamedTuple):
    """Style of a method in plots: colour (Okabe and Ito's set), marker and line style of matplotlib."""

    colour: str
    marker: str
    line: str = "-"


REFERENCES = {  # the methods that reports of a conversion draw
    "pilon": PlotStyle("#0072B2", "o"),
    "whitened-svd": PlotStyle("#E69F00", "s"),
    "svd": PlotStyle("#CC79A7", "^"),
}
DENSE = PlotStyle("#1f2937", "*")


@dataclass(frozen=True)
class Curve:
    """A line of the frontier: one method over all its ratios, or several methods that differ in their bits."""

    name: str
    title: str
    about: str
    style: PlotStyle


@dataclass(frozen=True)
class Method:
    """A row of a comparison: its `name` on the command line and in compare.json, and its `title` in tables."""

    name: str
    title: str
    curve: Curve


METHODS: Registry[Method] = Registry("method")


def method_of(name: str) -> Method:
    """Return the method registered under `name`; for another name, a method of that title without explanation."""
    if name == "dense":
        return Method(name, name, Curve(name, name, "", DENSE))
    return METHODS.get(name) or Method(name, name, Curve(name, name, "", reference(name)))


def reference(name: str) -> PlotStyle:
    """Return the style of a method in reports of a conversion: from REFERENCES, or a colour chosen by its name."""
    return REFERENCES.get(name) or PlotStyle(OTHER_COLOURS[sum(name.encode()) % len(OTHER_COLOURS)], "D")
