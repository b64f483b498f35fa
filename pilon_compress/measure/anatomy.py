"""What a model consists of, read from its config alone: shapes on the meta device, no weights."""

from collections.abc import Sequence
from typing import Any

from pilon_compress import checkpoint
from pilon_compress.families import find_sites
from pilon_compress.form.layout import Layout
from pilon_compress.form.stored import stored_layout
from pilon_compress.measure.size import DENSE_ITEMSIZE, bank_size, ffn_size, linear_macs, model_size


def anatomy(model: str, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The projections that a conversion of `model` would replace, or has replaced, and what they cost.

    `projections`: one entry per projection (name, layer, role, d_in, d_out, parameters, bytes, macs, bank). For a PILON
    model the parameters are those of the dense projection and `ffn`, `model_size` hold the ratios.
    """
    config = checkpoint.load_config(model)
    empty = checkpoint.empty_model(config)
    layout = stored_layout(config)
    if layout and not targets:
        targets = [*layout.projections, *layout.kept]  # what was replaced, which --targets may have chosen
    sites = find_sites(empty, targets, ignore)
    entries = [
        {
            "name": site.name,
            "layer": site.layer,
            "role": site.role,
            "d_in": site.d_in,
            "d_out": site.d_out,
            "parameters": site.parameters,
            "bytes": site.parameters * DENSE_ITEMSIZE,
            "macs": site.d_in * site.d_out,
            "bank": _home(layout, site.name),
        }
        for site in sites
    ]
    result: dict[str, Any] = {
        "model": model,
        "architecture": type(empty).__name__,
        "form": "pilon" if layout else "dense",
        "parameters": sum(p.numel() for p in empty.parameters()),
        "macs": linear_macs(empty),
        "replaced": sum(site.parameters for site in sites),
        "replaced_macs": sum(site.d_in * site.d_out for site in sites),
        "projections": entries,
    }
    if layout:
        result["ffn"] = ffn_size(layout).to_dict()
        result["model_size"] = model_size(layout, empty).to_dict()
        result["banks"] = {
            name: {**vars(spec), **bank_size(layout, name).to_dict()} for name, spec in layout.banks.items()
        }
    return result


def _home(layout: Layout | None, name: str) -> str | None:
    """Where a converted projection is kept: its bank, or a matrix of its own. None for one that was not converted."""
    if layout is None or name not in {**layout.projections, **layout.kept}:
        return None
    if name in layout.projections:
        return layout.projections[name].bank
    d_in, d_out = layout.shape(name)
    return f"matrix {d_in}→{d_out}"
