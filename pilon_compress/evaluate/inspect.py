"""Describe a model's projections, sizes and costs from its config alone: shapes on the meta device, no weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from pilon_compress.evaluate.untouched import notes, untouched
from pilon_compress.models import checkpoint
from pilon_compress.models.families import Site, find_sites
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import bank_size, ffn_size, linear_macs, model_size
from pilon_compress.nn.stored import stored_layout
from pilon_compress.report.layout_parts import layout_parts


def anatomy(model: str, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> dict[str, Any]:
    """Return the projections that a conversion of `model` would replace, or has replaced, with sizes and costs.

    `projections`: one entry per projection (name, layer, role, d_in, d_out, parameters, bytes, macs, bank), all of the
    dense projection, bytes in the dtype of the model's file. `untouched`: experts and routers that do not change (name,
    parameters, share); `notes`: sentences about them. A PILON model also has `parts` (see
    `report.layout_parts`), the ratios `ffn` and `model_size`, the `evaluation` of its report (None without one), and in
    each projection the stored form: `neurons`, rank, n_primitives, top_k, quantization, bits. Raises BadInput for a
    model that cannot be read, and for targets that match nothing.
    """
    config = checkpoint.load_config(model)
    empty = checkpoint.empty_model(config)
    layout = stored_layout(config)
    if layout and not targets:
        targets = [*layout.projections, *layout.kept]  # the replaced projections, which --targets may have chosen
    sites = find_sites(empty, targets, ignore)
    dtype = stored_dtype(config)
    result: dict[str, Any] = {
        "model": model,
        "architecture": type(empty).__name__,
        "form": "pilon" if layout else "dense",
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in empty.parameters()),
        "macs": linear_macs(empty),
        "replaced": sum(site.parameters for site in sites),
        "replaced_macs": sum(site.d_in * site.d_out for site in sites),
        "projections": [_entry(site, layout, dtype.itemsize) for site in sites],
        "untouched": untouched(empty, sites),
        "notes": notes(empty, sites),
    }
    if layout:
        _add_form(result, layout, sites, dtype.itemsize)
        report = _report(model)
        source = getattr(torch, str(report.get("source_dtype")), None) or dtype
        result["source_dtype"] = str(source).removeprefix("torch.")
        result["ffn"] = ffn_size(layout, dtype.itemsize).to_dict(source.itemsize)
        result["model_size"] = model_size(layout, empty, dtype.itemsize).to_dict(source.itemsize)
        result["evaluation"] = report.get("evaluation")
    return result


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype of the model's file in its config; float32 where it names none."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _entry(site: Site, layout: Layout | None, itemsize: int) -> dict[str, Any]:
    """Return the dense sizes of one projection, and the bank or matrix that replaced it."""
    return {
        "name": site.name,
        "layer": site.layer,
        "role": site.role,
        "d_in": site.d_in,
        "d_out": site.d_out,
        "parameters": site.parameters,
        "bytes": site.parameters * itemsize,
        "macs": site.d_in * site.d_out,
        "bank": _storage(layout, site.name),
    }


def _add_form(result: dict[str, Any], layout: Layout, sites: Sequence[Site], itemsize: int) -> None:
    """Add the parts and banks of a PILON model to `result`, and the stored form to its projections."""
    result["parts"] = parts = layout_parts(layout, sites, itemsize)
    result["banks"] = {
        name: {**vars(spec), **bank_size(layout, name, itemsize).to_dict()} for name, spec in layout.banks.items()
    }
    stored = {name: part for part in parts for name in part["names"]}
    for entry in result["projections"]:
        part = stored.get(entry["name"])
        if part is not None:
            inner = part["d_in"] if entry["role"] == "down" else part["d_out"]
            entry["neurons"] = inner // 2 if entry["role"] == "gate_up" else inner
            entry |= {key: part[key] for key in ("rank", "n_primitives", "top_k", "quantization", "bits")}


def _report(model: str) -> dict[str, Any]:
    """Return the report.json beside the weights; {} where it is missing or cannot be read."""
    try:
        report = json.loads((Path(checkpoint.resolve(model)) / "report.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) and isinstance(report.get("evaluation"), dict | None) else {}


def _storage(layout: Layout | None, name: str) -> str | None:
    """Return the bank of a converted projection, or its matrix's shape; None for one that was not converted."""
    if layout is None or name not in {**layout.projections, **layout.kept}:
        return None
    if name in layout.projections:
        return layout.projections[name].bank
    d_in, d_out = layout.shape(name)
    return f"matrix {d_in}→{d_out}"
