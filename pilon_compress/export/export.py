"""Exports: a PILON model as a plain dense host model, or as a folder that loads without this package."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import auto_factory, modeling_auto
from transformers.pytorch_utils import Conv1D

from pilon_compress.errors import BadInput
from pilon_compress.export import transformers_plugin
from pilon_compress.export.save import save_model
from pilon_compress.io import checksum, companions, manifest
from pilon_compress.io.folders import fresh_folder, open_output
from pilon_compress.kernels import reference
from pilon_compress.models import checkpoint
from pilon_compress.models.families import family_of
from pilon_compress.nn import (
    bank,
    composed_linear,
    dense_linear,
    int8,
    integer,
    layout,
    lazy,
    packed_ternary,
    ternary,
    ternary_codec,
    ternary_quantizer,
)
from pilon_compress.nn.fold import dense
from pilon_compress.nn.layout import BANKS, kept_matrices, linear_shape, projections

MODELING_FILE = "modeling_pilon.py"
# in this order one file can hold them
BUNDLED = (
    reference,
    ternary_quantizer,
    bank,
    composed_linear,
    dense_linear,
    ternary,
    ternary_codec,
    lazy,
    packed_ternary,
    integer,
    int8,
    layout,
    checksum,
    transformers_plugin,
)
HEADER = '''"""PILON for transformers, bundled by pilon-compress so that this folder loads without the package:

    AutoModel...from_pretrained(folder, trust_remote_code=True)

Generated from the package's own modules; do not edit.
"""
'''


def export_dense(source: str, output: Path, *, dtype: str = "auto", overwrite: bool = False) -> None:
    """Write the host model with every composition multiplied out: stock transformers loads it, no PILON remains.

    It computes what the PILON model computes (logits agree to about 1e-5 in float32) at the dense model's size.
    """
    with open_output(output, overwrite, source) as path:
        model = load_pilon(source, dtype)
        if layout.layout_of(model).rest:
            raise BadInput(f"{source} is in int8 throughout: export the model that it was packed from")
        to_dense(model)
        _save(model, source, path, overwrite)


def _save(model: PreTrainedModel, source: str, output: Path, overwrite: bool, code: str | None = None) -> None:
    """Write `model` with the tokenizer and companions of `source`, and the modeling `code` where there is some."""
    tokenizer, beside = checkpoint.load_tokenizer(source), companions.find(checkpoint.resolve(source))
    beside.pop(MODELING_FILE, None)  # of a self-contained source
    with fresh_folder(output, overwrite) as folder:
        save_model(model, tokenizer, folder, model.dtype)
        companions.copy(beside, folder)
        if code is not None:
            (folder / MODELING_FILE).write_text(code, "utf-8")


@torch.no_grad()
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, every composed projection by the layer class that the host architecture has there."""
    whole = checkpoint.empty_model(_host_config(model))
    skeleton, base = whole.base_model, model.base_model
    family = family_of(whole)
    fused = family.projections.get("gate_up", "") if family else ""
    found = [(name, *dense(one)) for name, one in projections(model)]
    found += [(name, one.matrix(), one.bias) for name, one in kept_matrices(model)]
    if any(one.norm is not None for _, one in (*projections(model), *kept_matrices(model))):
        raise BadInput("this model normalises the inputs of feed-forward projections, which its host has no place for")
    for name, weight, bias in found:
        host = skeleton.get_submodule(name)
        d_in, d_out = linear_shape(host)
        halves = 2 if fused and name.endswith(fused) else 1
        weight = _padded(weight, d_in, d_out, halves)
        bias = None if bias is None else _padded(bias[None], 1, d_out, halves)[0]
        base.set_submodule(name, _host_linear(host, weight, bias))
    delattr(base, BANKS)
    model.config = _host_config(model)
    return model


def _host_config(model: PreTrainedModel) -> PretrainedConfig:
    config = model.config.__class__.from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = model.config.architectures
    drop_bundled(config)
    return config


def drop_bundled(config: PretrainedConfig) -> None:
    """Remove, in place, the `auto_map` entries of a self-contained export: their code does not come along."""
    stem = MODELING_FILE.removesuffix(".py")
    named = getattr(config, "auto_map", None) or {}
    kept = {auto: place for auto, place in named.items() if not str(place).startswith(f"{stem}.")}
    if kept != named:
        config.auto_map = kept
    if named and not kept:
        del config.auto_map


def _padded(weight: torch.Tensor, d_in: int, d_out: int, halves: int) -> torch.Tensor:
    """A weight at the host's size: dropped neurons come back as zeros, behind the others of each half of gate_up."""
    parts = weight.chunk(halves, dim=1)
    wide = [pad(part, (0, d_out // halves - part.shape[1], 0, d_in - part.shape[0])) for part in parts]
    return torch.cat(wide, 1)


def _host_linear(host: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    d_in, d_out = weight.shape
    plain: nn.Module
    if isinstance(host, Conv1D):
        plain = Conv1D(d_out, d_in)
        plain.weight = nn.Parameter(weight.contiguous())
    else:
        plain = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.T.contiguous())
    if bias is not None:
        plain.bias = nn.Parameter(bias.clone())
    return plain


def export_self_contained(source: str, output: Path, *, overwrite: bool = False) -> None:
    """Write a copy of a PILON folder that also holds the code to load it, declared in config.json's `auto_map`.

    It loads with `trust_remote_code=True` where pilon-compress is not installed, and like any PILON folder where it is.
    """
    with open_output(output, overwrite, source) as path:
        model = load_pilon(source, "auto")
        found = [one for _, one in (*layout.banks(model), *layout.kept_matrices(model))]
        kernels = any(isinstance(one, packed_ternary.PackedBank | packed_ternary.PackedLinear) for one in found)
        if kernels or layout.layout_of(model).rest:
            raise BadInput(f"{source} is packed: its kernels do not travel with it, it needs pilon-compress to load")
        classes = host_classes(model)
        stem = MODELING_FILE.removesuffix(".py")
        model.config.auto_map = {auto: f"{stem}.Pilon{host}" for auto, host in classes.items()}
        _save(model, source, path, overwrite, bundle(sorted(set(classes.values()))))


def host_classes(model: PreTrainedModel) -> dict[str, str]:
    """Auto class -> host class name, for every auto class that knows this architecture."""
    found = {}
    autos: dict[str, Any] = vars(modeling_auto)
    for name, auto in autos.items():
        if isinstance(auto, type) and issubclass(auto, auto_factory._BaseAutoModelClass):
            mapping: Any = getattr(auto, "_model_mapping", None)
            host = mapping.get(type(model.config), None) if mapping else None
            if host is not None and hasattr(host, "__name__"):
                found[name] = host.__name__
    return {name: host for name, host in found.items() if not name.startswith("_")}


def bundle(hosts: list[str]) -> str:
    """One module: the sources of form and loader without their imports of each other, and a class per host class."""
    parts = [HEADER]
    for module in BUNDLED:
        lines = inspect.getsource(module).splitlines()
        kept = [line for line in lines if not line.startswith(("from pilon_compress", "import pilon_compress"))]
        parts.append("\n".join(kept))
    imports = "from transformers import " + ", ".join(hosts)
    classes = "\n\n".join(f"class Pilon{host}({host}):\n    pass\n" for host in hosts)
    return "\n\n".join([*parts, imports, "", classes])


def load_pilon(source: str, dtype: str) -> PreTrainedModel:
    """Load `source`, which must be a PILON model. Raises BadInput if it is dense."""
    model = checkpoint.load_model(source, dtype=dtype)
    manifest.verify_folder(checkpoint.resolve(source))
    if not hasattr(model.base_model, BANKS):
        raise BadInput(f"{source} is a dense model already; export takes the output of `pilon-compress convert`")
    return model
