"""Find the feed-forward blocks that can have an exit gate, and make every projection in them one of ours."""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.families import Site, find_sites
from pilon_compress.nn.exits import maps_states
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.installed import label_parts
from pilon_compress.nn.layout import BANKS, Layout
from pilon_compress.nn.part import Projection
from pilon_compress.nn.specs import DenseSpec, ExitSpec


def gate_places(dense: PreTrainedModel) -> dict[str, list[Site]]:
    """Return the projections of every feed-forward block by the block's name below the base model, in layer order.

    `dense`: the base architecture, on any device. Raises BadInput where a layer's feed-forward projections are not in
    one module that maps hidden states to hidden states, and have no exit.
    """
    layers: dict[int, list[Site]] = {}
    for site in find_sites(dense):
        layers.setdefault(site.layer, []).append(site)
    found: dict[str, list[Site]] = {}
    for sites in layers.values():
        parents = {site.name.rpartition(".")[0] for site in sites}
        block = dense.base_model.get_submodule(parent := min(parents))
        widths = {size for site in sites for size in ((site.d_out,) if site.role == "down" else (site.d_in,))}
        if len(parents) > 1 or len(widths) > 1 or parent.rpartition(".")[2].isdigit() or not maps_states(block):
            raise BadInput(
                f"{type(dense).__name__} has no exit gates: the feed-forward projections of a layer are not in one "
                f"module that takes hidden states alone ({', '.join(site.name for site in sites)})"
            )
        found[parent] = sites
    return found


@torch.no_grad()
def own_projections(model: PreTrainedModel, places: dict[str, list[Site]]) -> None:
    """Replace, in place, every plain projection in the blocks of `places` by a matrix of ours that holds its weight.

    A dense model then is a PILON model with the same outputs, which a layout describes.
    """
    base, matrix = model.base_model, FORMATS["none"].matrix
    for site in (one for sites in places.values() for one in sites):
        plain = base.get_submodule(site.name)
        if isinstance(plain, Projection):
            continue
        weight = plain.get_parameter("weight")
        weight = weight if type(plain).__name__ == "Conv1D" else weight.T
        with torch.device("meta"):
            made = matrix(site.d_in, site.d_out, site.bias, (site.d_in, site.d_out), 0)
        made.weight = nn.Parameter(weight.T.contiguous())
        if site.bias:
            made.bias = plain.get_parameter("bias")
        base.set_submodule(site.name, made)
    if not hasattr(base, BANKS):
        setattr(base, BANKS, nn.ModuleDict())
    label_parts(model)


def with_gates(layout: Layout | None, places: dict[str, list[Site]], substitute: int | None) -> Layout:
    """Return the layout of a model, None for a dense one, with gates for the blocks of `places`."""
    known = layout or Layout({}, {})
    plain = [site for sites in places.values() for site in sites if site.name not in known.replaced]
    matrices = {site.name: DenseSpec(site.d_in, site.d_out, site.bias) for site in plain}
    widths = {name: next(site.d_out for site in sites if site.role == "down") for name, sites in places.items()}
    exits = {name: ExitSpec(d, substitute=rank_of(d, substitute)) for name, d in widths.items()}
    return replace(known, matrices=known.matrices | matrices, exits=exits)


def rank_of(d: int, substitute: int | None) -> int:
    """Return the rank of the substitutes of blocks of hidden size `d`; None: the default."""
    return d // 8 if substitute is None else min(substitute, d)


def check_gates(config: object, reference: str) -> None:
    """Raise BadInput for a model that cannot have exit gates; `reference`: its name in messages."""
    if not checkpoint.is_causal(config):  # type: ignore[arg-type]
        raise BadInput(f"{reference} predicts no next token: exit gates are for causal language models")
    gate_places(checkpoint.empty_model(config))  # type: ignore[arg-type]
