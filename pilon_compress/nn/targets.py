"""Tell the projections of a model apart by their names: feed-forward, attention, or another mixer of tokens."""

import re
from collections.abc import Iterable
from typing import Literal, get_args

Target = Literal["ffn", "attention", "other"]

TARGETS: tuple[Target, ...] = get_args(Target)
LABELS: dict[Target, str] = {"ffn": "FFN", "attention": "attention", "other": "other projections"}

ATTENTION_LEAVES = {
    "q": ("q_proj", "query", "query_proj", "q_lin", "wq", "q"),
    "k": ("k_proj", "key", "key_proj", "k_lin", "wk", "k"),
    "v": ("v_proj", "value", "value_proj", "v_lin", "wv", "v"),
    "qkv": ("c_attn", "qkv_proj", "query_key_value", "qkv", "Wqkv"),
    "o": ("o_proj", "out_proj", "dense", "out_lin", "wo", "Wo", "c_proj", "out", "o"),
}
"""Role in an attention block -> names that architectures give to the projection."""

_NAMED_ALIKE = {leaf for role in ("q", "k", "v", "qkv") for leaf in ATTENTION_LEAVES[role] if "_" in leaf} | {"o_proj"}
_OTHER = re.compile(r"mamba|ssm|conv|recurrent|temporal|rwkv")
_OTHER_LEAVES = {"in_proj", "x_proj", "dt_proj"}


def target_of(name: str) -> Target:
    """Return the kind of block that the projection of this module name belongs to."""
    *parents, leaf = name.split(".")
    if any("att" in part.lower() for part in parents) or leaf in _NAMED_ALIKE:
        return "attention"
    if leaf in _OTHER_LEAVES or (leaf == "out_proj" and "mixer" in parents):
        return "other"
    if any(_OTHER.search(part.lower()) for part in parents):
        return "other"
    return "ffn"


def targets_of(names: Iterable[str]) -> list[Target]:
    """Return the kinds that occur among these module names, in the order of TARGETS."""
    found = {target_of(name) for name in names}
    return [target for target in TARGETS if target in found]


def label(targets: Iterable[Target]) -> str:
    """Name kinds of blocks in running text, as in `FFN and attention`."""
    return " and ".join(LABELS[target] for target in targets)
