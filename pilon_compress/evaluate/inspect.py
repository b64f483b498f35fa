"""Describe a model's projections, sizes and costs from its config alone: shapes on the meta device, no weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pilon_compress.evaluate.untouched import notes, untouched
from pilon_compress.models import checkpoint
from pilon_compress.models.families import Site, find_sites
from pilon_compress.models.in_memory import held_model, record_of
from pilon_compress.nn.kernel_names import kernel_names, kernel_note
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import bank_size, linear_macs, model_size, neuron_size, target_ratios
from pilon_compress.nn.stored import stored_layout
from pilon_compress.report.layout_parts import layout_parts
from pilon_compress.results.evaluation import Evaluation
from pilon_compress.results.inspection import InspectedBank, InspectedExit, InspectedProjection, Inspection
from pilon_compress.results.routing import Routing
from pilon_compress.results.sizes import Part


def anatomy(model: str, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> Inspection:
    """Return the projections that a conversion of `model` would replace, or has replaced, with sizes and costs.

    Sizes are those of the dense projections, bytes in the dtype of the model's file. Raises BadInput for a model that
    cannot be read, and for targets that match nothing.
    """
    config = checkpoint.load_config(model)
    empty = checkpoint.empty_model(config)
    layout = stored_layout(config)
    if layout and not targets:
        targets = layout.replaced  # the replaced projections, which --targets may have chosen
    sites = find_sites(empty, targets, ignore)
    dtype = stored_dtype(config)
    parts = layout_parts(layout, sites, dtype.itemsize) if layout else []
    device = checkpoint.find_device("auto").type
    kernels = kernel_names(layout, device) if layout else {}
    stored = {name: part for part in parts for name in part.names}
    found = Inspection(
        model=model,
        architecture=type(empty).__name__,
        form="pilon" if layout else "dense",
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in empty.parameters()),
        macs=linear_macs(empty),
        replaced=sum(site.parameters for site in sites),
        replaced_macs=sum(site.d_in * site.d_out for site in sites),
        projections=[_projection(site, layout, stored.get(site.name), dtype.itemsize, kernels) for site in sites],
        untouched=untouched(empty, sites),
        notes=[*notes(empty, sites), *([kernel_note(kernels, device)] if kernels else [])],
    )
    return found if layout is None else found.model_copy(update=_form(model, empty, layout, parts, dtype))


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """Return the dtype of the model's file in its config; float32 where it names none."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _projection(
    site: Site, layout: Layout | None, part: Part | None, itemsize: int, kernels: dict[str, str]
) -> InspectedProjection:
    """Return the dense sizes of one projection, and the `part` of a PILON model that replaced it."""
    return InspectedProjection(
        name=site.name,
        layer=site.layer,
        role=site.role,
        d_in=site.d_in,
        d_out=site.d_out,
        parameters=site.parameters,
        bytes=site.parameters * itemsize,
        macs=site.d_in * site.d_out,
        bank=_storage(layout, site.name),
        kernel=kernels.get(site.name),
        **({} if part is None or layout is None else _stored(site, part, layout)),
    )


def _stored(site: Site, part: Part, layout: Layout) -> dict[str, Any]:
    """Return the fields of `InspectedProjection` about its stored form."""
    found = {key: getattr(part, key) for key in ("rank", "n_primitives", "top_k", "quantization", "bits")}
    if site.name in layout.neurons:
        top_k = layout.neurons[site.name].top_k
        return {**found, "neurons": top_k, "top_k": top_k}
    inner = part.d_in if site.role == "down" else part.d_out
    return {**found, "neurons": inner // 2 if site.role == "gate_up" else inner}


def _form(model: str, empty: PreTrainedModel, layout: Layout, parts: list[Part], dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of an inspection that only a PILON model has."""
    report = _report(model)
    source = getattr(torch, str(report.get("source_dtype")), None) or dtype
    sizes = target_ratios(layout, dtype.itemsize, source.itemsize)
    routing = _routing(model) if layout.routers else None
    return {
        "parts": parts,
        **({"routing": routing} if routing is not None else {}),
        "banks": {
            name: InspectedBank(**vars(spec), **vars(bank_size(layout, name, dtype.itemsize).over_dense()))
            for name, spec in layout.banks.items()
        }
        | {name: _neuron_bank(layout, name, dtype.itemsize) for name in layout.neuron_banks},
        "exits": {name: InspectedExit(**vars(gate)) for name, gate in layout.exits.items()} or None,
        "source_dtype": str(source).removeprefix("torch."),
        **sizes,
        "ffn": sizes["ffn"].model_copy(update={"shared_primitives": report.get("shared_primitives")}),
        "model_size": model_size(layout, empty, dtype.itemsize).over_dense(source.itemsize),
        "evaluation": report.get("evaluation"),
    }


def _neuron_bank(layout: Layout, name: str, itemsize: int) -> InspectedBank:
    spec, size = layout.neuron_banks[name], neuron_size(layout, name, itemsize).over_dense()
    shape = {"d_in": spec.d_in, "d_out": spec.d_out, "n_primitives": spec.neurons, "rank": 1}
    return InspectedBank(**shape, quantization=spec.quantization, **vars(size))


def _report(model: str) -> dict[str, Any]:
    """Return three figures of the report.json beside the weights; {} where it cannot be read."""
    try:
        found = json.loads(_page(model))
        figures = found["evaluation"]
        known = figures and {key: value for key, value in figures.items() if key in Evaluation.model_fields}
        return {
            "evaluation": known and Evaluation.model_validate(known),
            "source_dtype": found.get("source_dtype"),
            "shared_primitives": (found.get("ffn") or {}).get("shared_primitives"),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _routing(model: str) -> Routing | None:
    """Return the figures of the routers in the train.json beside the weights; None where it cannot be read."""
    try:
        return Routing.model_validate(json.loads(_page(model, "train.json"))["routing"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _page(model: str, name: str = "report.json") -> bytes:
    """Return the report of that name beside the weights, or that of a model in memory."""
    if (held := held_model(model)) is not None:
        record = record_of(held)
        if name == "report.json" and record.report:
            return record.report.model_dump_json().encode()
        return record.pages[name]
    return (Path(checkpoint.resolve(model)) / name).read_bytes()


def _storage(layout: Layout | None, name: str) -> str | None:
    """Return the bank of a converted projection, or its matrix's shape; None for one that was not converted."""
    if layout is None or name not in layout.replaced:
        return None
    if name in layout.projections:
        return layout.projections[name].bank
    if name in layout.neurons:
        return layout.neurons[name].bank
    d_in, d_out = layout.shape(name)
    return f"matrix {d_in}→{d_out}"
