"""Find the attention projections of a block by their names: query, key, value (or the three in one) and output."""

from torch import nn

from pilon_compress.nn.part import is_linear
from pilon_compress.nn.targets import ATTENTION_LEAVES, target_of

_ROLES = {leaf: role for role, leaves in ATTENTION_LEAVES.items() for leaf in leaves}
READERS = ("q", "k", "v", "qkv")
"""Roles of the projections that read the block's input, all of them the same."""


def attention_roles(layer: nn.Module) -> dict[str, str]:
    """Return path -> role (q, k, v or qkv, and o) of the attention projections of one block.

    Empty where they cannot be told: without attention, with two attentions (those of a decoder with an encoder), and
    with projections that go by other names (latent and linear attention).
    """
    found: dict[str, str] = {}
    for path, module in layer.named_modules():
        if is_linear(module) and target_of(path) == "attention":
            role = _ROLES.get(path.rpartition(".")[2])
            if role is None:
                return {}
            found[path] = role
    roles = sorted(found.values())
    return found if roles in (["k", "o", "q", "v"], ["o", "qkv"]) else {}


def mixes_by_attention(layer: nn.Module) -> bool:
    """Return True if a block has linear projections in an attention."""
    return any(is_linear(module) and target_of(path) == "attention" for path, module in layer.named_modules())
