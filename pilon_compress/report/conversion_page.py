"""Write the report of a conversion: `report.json` for programs, `report.html`, one self-contained page, for people."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pilon_compress.report import formatting, plot_style, plots

Report = Mapping[str, Any]
Row = dict[str, str]
_OPEN_TABLE = 12  # banks up to which a table shows each of them


def write_report(report: Report, folder: str | Path) -> None:
    """Write `report.json` and `report.html` into `folder` (made when missing).

    `report` holds plain JSON types only. Infinite and undefined numbers become null, which every JSON reader
    understands. Equal reports give equal bytes. Raises OSError where the folder cannot be written.
    """
    folder = Path(folder)
    plain = _finite(report)
    page = render(plain)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(_json(plain), encoding="utf-8", newline="\n")
    (folder / "report.html").write_text(page, encoding="utf-8", newline="\n")


def render(report: Report) -> str:
    """Return the page of a report: no script, nothing loaded from elsewhere, all text from models escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": formatting.number,
        "short": formatting.short_count,
        "mib": formatting.mib,
        "layers": formatting.layer_list,
        "method": formatting.method_name,
        "colour": plot_style.method_colour,
    }
    source = (
        resources.files("pilon_compress.report").joinpath("templates/conversion.html.j2").read_text(encoding="utf-8")
    )
    return environment.from_string(source).render(_view(report))


def _view(report: Report) -> dict[str, Any]:
    """Return the values of the template."""
    ratios = formatting.ratios(report)
    shared = any(len(bank["layers"]) > 1 for bank in report["plan"]["banks"])
    return {
        "report": report,
        "replaced_name": formatting.replaced_of(report)[0],
        "replaced": formatting.replaced_of(report)[1],
        "attention": bool(report.get("attention")),
        "shared": shared,
        "method": formatting.method_name(report["method"]),
        "costs": [(label, [r for r in ratios if r.label == label]) for label in dict.fromkeys(r.label for r in ratios)],
        "quality": formatting.quality(report["evaluation"]),
        "losses": _losses(report),
        "whitened_loss_meaning": formatting.WHITENED_LOSS,
        "plan": _tables(report["plan"]["banks"], _plan_row),
        "use": _tables(_composed(report), _use_row),
        "anatomy": _anatomy(report),
        "calibration": formatting.circumstances(report["calibration"]),
        "evaluation": formatting.circumstances(report["evaluation"]),
        **_drawings(report),
    }


def _drawings(report: Report) -> dict[str, Markup | None]:
    """Return the plots, None where the report has nothing to draw."""
    projections = report["projections"]
    composed = _composed(report)
    errors = [p for p in projections if p["relative_error"]]
    spectra = [p for p in projections if p["spectrum"] and p["spectrum"]["index"]]
    return {
        "error_plot": Markup(plots.error_by_layer(errors)) if errors else None,
        "spectra_plot": Markup(plots.spectra(spectra)) if spectra else None,
        "composition_plot": Markup(plots.composition(composed)) if composed else None,
    }


def _losses(report: Report) -> list[dict[str, Any]]:
    """Return the whitened loss per method, the used one first, with the width of its bar in percent of the worst."""
    losses = report["whitened_loss"]
    worst = max((v for v in losses.values() if v is not None), default=0.0) or 1.0
    names = [report["method"], *formatting.METHOD_NAMES]
    return [
        {
            "method": method,
            "value": losses[method],
            "width": round(100 * (losses[method] or 0.0) / worst, 2),
            "used": method == report["method"],
        }
        for method in formatting.in_order(losses, list(dict.fromkeys(names)))
    ]


def _composed(report: Report) -> list[Report]:
    """Return the banks of more than one primitive."""
    return [bank for bank in report["banks"] if bank["energy"] and len(bank["energy"][0]) > 1]


def _tables(banks: Sequence[Report], row: Callable[[Sequence[Report]], Row]) -> dict[str, list[Row]]:
    """Return one table of all banks if they are few, else a table of one row per role and a folded one of all banks."""
    roles = _by_role(banks)
    rows = [row([bank]) for members in roles for bank in members]
    if len(rows) <= _OPEN_TABLE:
        return {"top": rows, "folded": []}
    return {"top": [row(members) for members in roles], "folded": rows}


def _by_role(banks: Sequence[Report]) -> list[list[Report]]:
    roles = formatting.in_order((bank["role"] for bank in banks), formatting.ROLE_ORDER)
    return [sorted((b for b in banks if b["role"] == role), key=lambda b: b["band"]) for role in roles]


def _bank_label(banks: Sequence[Report]) -> str:
    return f"{banks[0]['band']}" if len(banks) == 1 else f"{len(banks):,} bands"


def _plan_row(banks: Sequence[Report]) -> Row:
    """Return a row of the plan table for one bank, or for all banks of a role together."""

    def total(key: str) -> float:
        return float(sum(bank[key] for bank in banks))

    def over(key: str) -> str:
        return formatting.number(total(key) / total(f"dense_{key}")) if total(f"dense_{key}") else formatting.NONE

    shapes = dict.fromkeys(f"{bank['d_in']:,} → {bank['d_out']:,}" for bank in banks)
    return {
        "role": banks[0]["role"],
        "bank": _bank_label(banks),
        "layers": formatting.layer_list([layer for bank in banks for layer in bank["layers"]]),
        "shape": ", ".join(shapes),
        "primitives": formatting.spread(bank["n_primitives"] for bank in banks),
        "rank": formatting.spread(bank["rank"] for bank in banks),
        "top_k": formatting.spread(bank["top_k"] for bank in banks),
        "composition": ", ".join(dict.fromkeys(str(bank["composition"] or formatting.NONE) for bank in banks)),
        "stored": formatting.short_count(total("stored")),
        "dense_stored": formatting.short_count(total("dense_stored")),
        "stored_ratio": over("stored"),
        "mac_ratio": over("macs"),
    }


def _use_row(banks: Sequence[Report]) -> Row:
    """Return a row of the table of bank diagnostics for one bank, or for all banks of a role together."""

    def every(key: str) -> list[Any]:
        return [value for bank in banks for value in bank[key]]

    shares = every("selected_share")
    several = [share * len(b["layers"]) > 1.5 for b in banks for share in b["selected_share"]]
    sharing = any(len(bank["layers"]) > 1 for bank in banks)
    return {
        "role": banks[0]["role"],
        "bank": _bank_label(banks),
        "layers": formatting.layer_list(every("layers")),
        "entropy": formatting.spread(every("entropy")),
        "gini": formatting.spread(every("gini")),
        "utilisation": formatting.spread(bank["utilisation"] for bank in banks),
        "several": formatting.number(sum(several) / len(several)) if sharing and several else formatting.NONE,
        "selected": formatting.number(sum(shares) / len(shares)) if shares else formatting.NONE,
    }


def _anatomy(report: Report) -> dict[str, Any]:
    """Return the parameters of the dense and the compressed model: what is replaced, then all unchanged parts."""
    dense, stored = report["model"]["dense_stored"], report["model"]["stored"]
    replaced = formatting.replaced_of(report)[1]
    kept = sorted(report["kept"], key=lambda part: -part["parameters"])
    full = max(dense, stored, 1)
    shades = ("#475569", "#64748b", "#94a3b8", "#b6c2d1", "#d5dde7")
    parts = [
        {
            "name": part["name"],
            "parameters": part["parameters"],
            "of_dense": part["parameters"] / dense if dense else None,
            "of_stored": part["parameters"] / stored if stored else None,
            "width": round(100 * part["parameters"] / full, 2),
            "shade": shades[min(place, len(shades) - 1)],
        }
        for place, part in enumerate(kept)
    ]
    bars = [
        ("dense", dense, round(100 * replaced["dense_stored"] / full, 2)),
        ("compressed", stored, round(100 * replaced["stored"] / full, 2)),
    ]
    return {"parts": parts, "bars": bars, "colour": plot_style.method_colour(report["method"])}


def _finite(value: Any) -> Any:
    """Return a JSON value with null in place of infinite and undefined numbers, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _json(report: Report) -> str:
    """Return indented JSON with lists of numbers on one line (a line break never occurs inside a JSON string)."""
    join: Callable[[re.Match[str]], str] = lambda match: "[" + " ".join(match[1].split()) + "]"  # noqa: E731
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\n\s*([-+\d.eE,\s]+?)\n\s*\]", join, text) + "\n"
