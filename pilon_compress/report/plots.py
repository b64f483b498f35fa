"""Plot the error, the singular spectra and the compositions of a conversion as inline SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, LinearSegmentedColormap, ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pilon_compress.report.formatting import METHOD_NAMES, ROLE_ORDER, in_order, layer_list, method_name
from pilon_compress.report.methods import reference
from pilon_compress.report.plot_style import (
    INK,
    QUIET,
    RULE,
    STYLE,
    is_drawable,
    log_axis,
    method_colour,
    panels,
    svg,
)

Projection = Mapping[str, Any]
Bank = Mapping[str, Any]


def error_by_layer(projections: Sequence[Projection]) -> str:
    """Plot the relative output error of every projection over its layer: one panel per role, one line per method."""
    roles = in_order((p["role"] for p in projections), ROLE_ORDER)
    methods = in_order((m for p in projections for m in p["relative_error"]), list(METHOD_NAMES))
    values = [v for p in projections for v in p["relative_error"].values() if is_drawable(v)]
    crowded = len({p["layer"] for p in projections}) > 20  # then one panel per line of the page
    height, columns = (2.1 * len(roles) + 0.4, 1) if crowded else (3.3, len(roles))
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(roles), height, columns, share_y=True)
        for axis, role in zip(axes, roles, strict=True):
            members = sorted((p for p in projections if p["role"] == role), key=lambda p: p["layer"])
            _shade_bands(axis, members)
            for method in methods:
                _draw_errors(axis, members, method)
            axis.set_title(role)
            axis.set_xlim(members[0]["layer"] - 0.5, members[-1]["layer"] + 0.5)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16 if crowded else 9, min_n_ticks=1))
            axis.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        positive = [v for v in values if v > 0]
        if positive and max(positive) > 50 * min(positive):
            log_axis(axes[0], max(min(positive), 1e-3 * max(positive)), max(positive))
        else:
            axes[0].set_ylim(0, 1.08 * max(positive, default=1.0))
        for axis in axes[::columns]:
            axis.set_ylabel("relative output error")
        for axis in axes[-columns:]:
            axis.set_xlabel("layer")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=max(1, len(labels)))
        return svg(figure, "error", "Relative output error of every layer, by role and method")


def _draw_errors(axis: Axes, members: Sequence[Projection], method: str) -> None:
    points = [(p["layer"], p["relative_error"].get(method)) for p in members]
    known = [(layer, error) for layer, error in points if is_drawable(error)]
    axis.plot(
        [layer for layer, _ in known],
        [error for _, error in known],
        color=method_colour(method),
        marker=reference(method).marker,
        markersize=5,
        linewidth=1.6,
        label=method_name(method),
    )


def spectra(projections: Sequence[Projection]) -> str:
    """Plot the whitened singular spectra: one panel per role, one line per layer, a dot where the rank was cut."""
    roles = in_order((p["role"] for p in projections), ROLE_ORDER)
    colours, norm = _layer_scale(sorted({p["layer"] for p in projections}))
    energies = [e for p in projections for e in p["spectrum"]["energy"] if is_drawable(e) and e > 0]
    top = max(energies, default=1.0)
    few = len(projections) <= 12 * len(roles)
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(roles), 3.5, len(roles), share_y=True)
        for axis, role in zip(axes, roles, strict=True):
            for p in (p for p in projections if p["role"] == role):
                _draw_spectrum(axis, p, colours(norm(p["layer"])), dot_size=6.5 if few else 4.5)
            axis.set_title(role)
            axis.set_xlabel("singular value, largest first")
            axis.set_xlim(left=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axis.grid(color="#eef0f3", linewidth=0.8)
        log_axis(axes[0], max(min(energies, default=top), top * 1e-7), top)
        axes[0].set_ylabel("share of the output energy")
        _layer_bar(figure, axes, colours, norm)
        return svg(figure, "spectra", "Singular spectra of the whitened weights, by role and layer")


def _draw_spectrum(axis: Axes, projection: Projection, colour: Any, dot_size: float) -> None:
    points = zip(projection["spectrum"]["index"], projection["spectrum"]["energy"], strict=True)
    known = [(index, energy) for index, energy in points if is_drawable(energy) and energy > 0]
    if not known:
        return
    index, energy = (np.asarray(column, dtype=float) for column in zip(*known, strict=True))
    axis.plot(index, energy, color=colour, linewidth=1.3)
    if projection["cut"]:
        cut = projection["cut"]
        height = math.exp(np.interp(cut, index, np.log(energy)))
        edge = 0.8 if dot_size > 5 else 0.5
        axis.plot(cut, height, "o", color=colour, ms=dot_size, mec=INK, mew=edge, zorder=5)


def composition(banks: Sequence[Bank]) -> str:
    """Plot each primitive's share of each layer's energy: one map per role, layers by primitives."""
    roles = in_order((b["role"] for b in banks), ROLE_ORDER)
    by_role = {role: sorted((b for b in banks if b["role"] == role), key=lambda b: b["band"]) for role in roles}
    rows = max(sum(len(b["layers"]) for b in members) for members in by_role.values())
    wide = max(len(layer) for b in banks for layer in b["energy"]) > 200  # then one map per line of the page
    height = max(2.5, 0.9 + rows * (0.26 if rows <= 12 else min(0.15, 5 / rows)))
    maps = {role: _composition_map(members) for role, members in by_role.items()}
    colours, norm, beyond = _share_scale(maps.values())
    with matplotlib.rc_context(STYLE):
        columns = 1 if wide else len(roles)
        figure, axes = panels(len(roles), height * len(roles) / columns, columns)
        for axis, role in zip(axes, roles, strict=True):
            _draw_map(axis, maps[role], by_role[role], colours, norm)
            axis.set_title(role)
            axis.set_xlabel("primitive, largest first within its band")
        for axis in axes[::columns]:
            axis.set_ylabel("layer")
        shrink = min(1.0, 3.2 / figure.get_figheight())
        place: dict[str, Any] = {"shrink": shrink, "anchor": (0.0, 1.0), "pad": 0.015, "extend": beyond}
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, **place)
        bar.set_label("share of the layer's energy")
        bar.outline.set_edgecolor(RULE)
        return svg(figure, "composition", "Composition of every layer from the primitives of its band")


def _share_scale(maps: Iterable[NDArray[np.float64]]) -> tuple[Colormap, Normalize, str]:
    """Return a scale of white to dark blue for shares, and "max" if some lie beyond its end, else "neither".

    The scale ends at the 99th percentile, so that a few layers that use one primitive only do not bleach the others.
    """
    shares = np.concatenate([shares[shares > 0] for shares in maps])
    end = float(np.quantile(shares, 0.99)) if shares.size else 1.0
    colours = LinearSegmentedColormap.from_list("share", ["#ffffff", "#d3e5f2", "#6aaed6", "#0072B2", "#002f4d"])
    return colours, PowerNorm(0.5, vmin=0, vmax=end), "max" if (shares > end).any() else "neither"


def _shade_bands(axis: Axes, members: Sequence[Projection]) -> None:
    """Draw a grey background under every second band, if bands have several layers."""
    if len({p["band"] for p in members}) < len(members):
        for p in members:
            if p["band"] % 2:
                left, right = p["layer"] - 0.5, p["layer"] + 0.5
                axis.axvspan(left, right, color="#f3f4f6", linewidth=0, zorder=0, antialiased=False)


def _layer_scale(layers: Sequence[int]) -> tuple[Colormap, Normalize]:
    """Return colours for layers, dark to light, without the yellow that is invisible on white."""
    ramp = matplotlib.colormaps["viridis"]
    if len(layers) <= 12:
        edges = [layers[0] - 0.5, *((a + b) / 2 for a, b in pairwise(layers)), layers[-1] + 0.5]
        colours = ListedColormap(ramp(np.linspace(0, 0.88, len(layers))))
        return colours, BoundaryNorm(edges, len(layers))
    return ListedColormap(ramp(np.linspace(0, 0.88, 256))), Normalize(layers[0], layers[-1])


def _layer_bar(figure: Figure, axes: Sequence[Axes], colours: Colormap, norm: Normalize) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.015)
    if isinstance(norm, BoundaryNorm):
        edges = [float(edge) for edge in norm.boundaries]
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        bar.set_ticks(middles, labels=[f"{middle:.0f}" for middle in middles])
        bar.ax.tick_params(length=0)
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    bar.set_label("layer")
    bar.outline.set_edgecolor(RULE)
    bar.ax.invert_yaxis()


def _composition_map(members: Sequence[Bank]) -> NDArray[np.float64]:
    """Return shares (layers of all bands of one role, primitives), largest first; NaN after a bank's last primitive."""
    width = max(len(row) for bank in members for row in bank["energy"])
    blocks = []
    for bank in members:
        energy = np.nan_to_num(np.asarray(bank["energy"], dtype=float), posinf=0.0)
        share = energy / np.maximum(energy.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        share = share[:, np.argsort(-share.sum(axis=0), kind="stable")]
        blocks.append(np.pad(share, ((0, 0), (0, width - share.shape[1])), constant_values=np.nan))
    return np.concatenate(blocks)


def _draw_map(
    axis: Axes, shares: NDArray[np.float64], members: Sequence[Bank], colours: Colormap, norm: Normalize
) -> None:
    colours = colours.with_extremes(bad="#e5e7eb")
    axis.imshow(shares, cmap=colours, norm=norm, aspect="auto", interpolation="none")
    layers = [layer for bank in members for layer in bank["layers"]]
    starts = np.cumsum([0, *(len(bank["layers"]) for bank in members)])
    if len(layers) <= 16 or len(members) == len(layers):
        step = math.ceil(len(layers) / 16)
        axis.set_yticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
    else:
        middles = [(a + b - 1) / 2 for a, b in pairwise(starts)]
        axis.set_yticks(middles, labels=[layer_list(bank["layers"]) for bank in members])
    if len(members) < len(layers):
        for start in starts[1:-1]:
            axis.axhline(start - 0.5, color="white", linewidth=4)
            axis.axhline(start - 0.5, color=QUIET, linewidth=0.8)
    axis.tick_params(length=0)
    axis.set_xticks([0, shares.shape[1] - 1] if shares.shape[1] > 1 else [0])
    axis.set_xticklabels(["1", str(shares.shape[1])] if shares.shape[1] > 1 else ["1"])
