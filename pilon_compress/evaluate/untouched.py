"""Find the experts and routers of a model that a conversion does not change."""

from collections import Counter
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from pilon_compress.models.attention import mixes_by_attention
from pilon_compress.models.blocks import blocks
from pilon_compress.models.families import Site
from pilon_compress.report.formatting import layer_list, number
from pilon_compress.results.sizes import Share

SMALL = 0.05  # share of parameters in projections to replace below which users are warned


def untouched(model: PreTrainedModel, sites: Sequence[Site]) -> list[Share]:
    """Return the parts of expert layers that replacing `sites` does not change, largest first; [] without experts.

    Each entry is one part, summed over the blocks: `name` below the base model with `*` for the block, `parameters`,
    and their `share` of the model.
    """
    replaced = {site.name for site in sites}
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes: Counter[str] = Counter()
    for name, block in blocks(model).items():
        parts = _expert_parts(block)
        for path, parameter in block.named_parameters():
            owner = path.rpartition(".")[0]
            part = next((part for part in parts if f"{path}.".startswith(f"{part}.")), None)
            if part is not None and f"{name}.{owner}" not in replaced:
                sizes[f"{name.rpartition('.')[0]}.*.{part}"] += parameter.numel()
    return [Share(name=name, parameters=size, share=size / total) for name, size in sizes.most_common()]


def notes(model: PreTrainedModel, sites: Sequence[Site]) -> list[str]:
    """Return sentences about experts and attention that a conversion of `sites` leaves alone, and a small reach."""
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = []
    if parts := untouched(model, sites):
        names = ", ".join(entry.name for entry in parts[:3]) + (", ..." if len(parts) > 3 else "")
        share = sum(entry.share for entry in parts)
        lines.append(f"mixture of experts: {number(100 * share)} % of the parameters are not touched ({names})")
    if left := _dense_attention(model, sites):
        lines.append(f"the attention of layers {layer_list(left)} stays dense")
    reached = sum(site.parameters for site in sites) / total
    if reached < SMALL:
        lines.append(f"only {number(100 * reached)} % of the parameters are in projections that would be replaced")
    return lines


def _dense_attention(model: PreTrainedModel, sites: Sequence[Site]) -> list[int]:
    """Return the layers whose attention stays as it is where that of others is replaced."""
    replaced = {site.layer for site in sites if site.target == "attention"}
    layers = enumerate(blocks(model).values()) if replaced else ()
    return [index for index, block in layers if index not in replaced and mixes_by_attention(block)]


def _expert_parts(block: nn.Module) -> list[str]:
    """Return the paths in a block of the members of expert layers, and of experts and routers in the block itself."""
    parts: list[str] = []
    for path, module in block.named_modules():
        if path.startswith(tuple(f"{part}." for part in parts)):
            continue
        members = {**dict(module.named_children()), **dict(module.named_parameters(recurse=False))}
        experts = {name for name, member in members.items() if _is_expert(name, member)}
        if not experts:
            continue
        if path:
            parts += [f"{path}.{name}" for name in members]
        else:
            parts += [name for name in members if name in experts or "router" in name.lower()]
    return parts


def _is_expert(name: str, member: object) -> bool:
    return "expert" in name.lower() or "expert" in type(member).__name__.lower()
