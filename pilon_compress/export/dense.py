"""Exports to a plain dense model of the base architecture: every composition multiplied out."""

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pilon_compress.config.export import ExportOptions
from pilon_compress.errors import BadInput
from pilon_compress.export.registry import DEFAULTS, ExportJob, exporter
from pilon_compress.export.save import drop_bundled, save_beside
from pilon_compress.models import checkpoint
from pilon_compress.models.families import family_of
from pilon_compress.models.task import text_config
from pilon_compress.nn.additions import addition
from pilon_compress.nn.fold import dense
from pilon_compress.nn.installed import dense_matrices, layout_of, neuron_projections, projections
from pilon_compress.nn.layout import BANKS, Layout
from pilon_compress.nn.part import linear_shape
from pilon_compress.results.export import Exported

# what configs call the neurons of a block
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "ffn_hidden_size")

EXPERTS = "has experts, and no such form: `--to self-contained` writes it with the code that routes"


def refuse(model: PreTrainedModel, options: ExportOptions = DEFAULTS) -> str | None:
    """Say why `model` has no dense form; None if it has one."""
    if layout_of(model).routers:
        return EXPERTS
    if layout_of(model).rest:
        return "is in integers throughout: export the model that it was packed from"
    if layout_of(model).exits:
        return "has exit gates, which no dense model has: export the model that they were added to"
    if _adds_biases(layout_of(model)) and not hasattr(model.config, "mlp_bias"):
        return f"has biases before its activations, for which {type(model).__name__} has no place"
    additions = [addition(name, kind) for name, kind, _ in layout_of(model).additions()]
    return next((one.dense for one in additions if one.dense), None)


def _adds_biases(layout: Layout) -> bool:
    """Return True if neurons have biases where the dense projections have none."""
    return any(one.scaled and not one.bias and one.role != "down" for one in layout.neurons.values())


@exporter(
    "dense",
    about="The base architecture with plain matrices: stock transformers loads it, no PILON remains.",
    load="AutoModel.from_pretrained({folder!r})",
    refuse=refuse,
)
def write(model: PreTrainedModel, job: ExportJob) -> Exported:
    """Write the dense model: it computes what the PILON model computes (logits agree to about 1e-5 in float32)."""
    to_dense(model)
    save_beside(model, job, model.dtype)
    return Exported()


@torch.no_grad()
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, every projection of ours by the layer class that the base architecture has there.

    Raises BadInput for a model that has no dense form, see `refuse`.
    """
    if reason := refuse(model):
        raise BadInput(f"this model {reason}")
    layout = layout_of(model)
    config = narrow_config(model, layout) or _host_config(model, layout)
    whole = checkpoint.empty_model(config)
    skeleton, base = whole.base_model, model.base_model
    family = family_of(whole)
    fused = family.projections.get("gate_up", "") if family else ""
    found = [(name, *dense(one)) for name, one in projections(model)]
    found += [(name, one.matrix(), one.bias) for name, one in dense_matrices(model)]
    found += [(name, *one.matrix()) for name, one in neuron_projections(model)]
    for name, weight, bias in found:
        host = skeleton.get_submodule(name)
        d_in, d_out = linear_shape(host)
        halves = 2 if fused and name.endswith(fused) else 1
        bias = weight.new_zeros(weight.shape[1]) if bias is None and host.bias is not None else bias
        weight = _padded(weight, d_in, d_out, halves)
        bias = None if bias is None else _padded(bias[None], 1, d_out, halves)[0]
        base.set_submodule(name, _host_linear(host, weight, bias))
    delattr(base, BANKS)
    model.config = config
    return model


def narrow_config(model: PreTrainedModel, layout: Layout) -> PretrainedConfig | None:
    """Return the config of the base architecture with the neurons that every layer has left; None if there is none.

    There is where all layers have the same width, and all projections that the config sizes are replaced.
    """
    for name in WIDTHS:
        narrow = _host_config(model, layout)
        text = text_config(narrow)
        if not hasattr(text, name):
            continue
        for width in {layout.shape(one)[0] for one in layout.replaced}:
            setattr(text, name, width)
            empty = checkpoint.empty_model(narrow).base_model
            if all(linear_shape(empty.get_submodule(one)) == layout.shape(one) for one in layout.replaced):
                return narrow
    return None


def _host_config(model: PreTrainedModel, layout: Layout) -> PretrainedConfig:
    config = model.config.__class__.from_dict(model.config.to_dict())
    if _adds_biases(layout):
        config.mlp_bias = True
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = model.config.architectures
    drop_bundled(config)
    return config


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
