"""Find the projections of a model to replace: feed-forward ones by a table of architectures or else by the shapes of
linears, attention's by their names."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.models.attention import READERS, attention_roles
from pilon_compress.models.blocks import blocks
from pilon_compress.models.task import text_config
from pilon_compress.nn.part import is_linear, linear_shape
from pilon_compress.nn.targets import TARGETS, Target, target_of
from pilon_compress.plugins import Registry


@dataclass(frozen=True)
class Family:
    """The feed-forward projections of an architecture. `projections`: role -> path below one transformer block."""

    projections: dict[str, str]


HEADS = {"num_heads", "n_heads", "n_head", "num_attention_heads", "head_dim", "attention_head_size"} | {
    *("num_key_value_heads", "num_key_value_groups", "ssm_state_size", "state_size", "d_state")
}
"""Attributes of modules that mix tokens: attention and state-space models."""

GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
BERT = Family({"up": "intermediate.dense", "down": "output.dense"})

FAMILIES: Registry[Family] = Registry("architecture")  # by model type of the config; others are detected by shape
_ROWS = {
    "gpt2": Family({"up": "mlp.c_fc", "down": "mlp.c_proj"}),
    "llama": Family(GATED),
    "mistral": Family(GATED),
    "qwen2": Family(GATED),
    "qwen3": Family(GATED),
    "gemma": Family(GATED),
    "gemma2": Family(GATED),
    "gemma3_text": Family(GATED),
    "phi3": Family({"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}),
    "arcee": Family({"up": "mlp.up_proj", "down": "mlp.down_proj"}),
    "opt": Family({"up": "fc1", "down": "fc2"}),
    "gpt_neox": Family({"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}),
    "bert": BERT,
    "roberta": BERT,
    "distilbert": Family({"up": "ffn.lin1", "down": "ffn.lin2"}),
}
for _model_type, _row in _ROWS.items():
    FAMILIES.add(_model_type, _row)


KINDS: dict[str, tuple[Target, ...]] = {"ffn": ("ffn",), "attention": ("attention",), "all": ("ffn", "attention")}
"""Word of --targets and --ignore -> kinds of blocks that it stands for."""


@dataclass(frozen=True)
class Site:
    """A linear projection that may be replaced: its name, role, shape, and the block that it belongs to."""

    name: str
    """Module name below the base model."""
    layer: int
    role: str
    """gate, up, down or gate_up (fused); in attention q, k, v or qkv (fused) and o; for any other its path with
    underscores."""
    d_in: int
    d_out: int
    bias: bool
    input: str
    """Name of the site whose input it shares: gate and up of one layer read the same activations, and so do q, k, v."""
    block: tuple[str, ...] = ()
    """Names of all projections of its feed-forward block; empty if neurons cannot be pruned there: see `_block`."""

    @property
    def parameters(self) -> int:
        """Return the number of weights, bias included."""
        return self.d_in * self.d_out + self.d_out * self.bias

    @property
    def target(self) -> Target:
        """Return the kind of block that it belongs to: ffn, attention or other."""
        return target_of(self.name)


def find_sites(model: PreTrainedModel, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Site]:
    """Return the projections of `model` (on any device, meta included) to replace, in layer order.

    Without `targets` these are the feed-forward projections. `targets` and `ignore` are `ffn`, `attention` or `all` of
    both, module names below the base model, class names, or `re:` followed by a regular expression that the module name
    must match from its start; these may name any linear projection inside a layer. Raises BadInput when nothing is
    left, and for a kind of block that the model does not have.
    """
    layers = blocks(model)
    family, kinds = family_of(model), kinds_named(targets)
    if family is None and "ffn" in kinds:
        raise BadInput(
            f"no feed-forward projections found in {type(model).__name__} (experts, attention and state-space mixers "
            "are not replaced by themselves); name projections with --targets"
        )
    known = text_config(model.config).model_type in FAMILIES
    hidden = _hidden_size(model)
    feed_forward = {path: role for role, path in family.projections.items()} if family else {}
    sites, named = [], [one for one in targets if one not in KINDS]
    attends = False
    for index, (layer_name, layer) in enumerate(layers.items()):
        block, attention = _block(layer, feed_forward, layer_name, known), attention_roles(layer)
        attends |= bool(attention)
        for path, module in layer.named_modules():
            name = f"{layer_name}.{path}"
            is_target = (
                ("ffn" in kinds and path in feed_forward and not mixes_tokens(layer, path, hidden))
                or ("attention" in kinds and path in attention)
                or _matches(name, module, named)
            )
            if not is_target or not is_linear(module) or _matches(name, module, ignore):
                continue
            d_in, d_out = linear_shape(module)
            role = {**attention, **feed_forward}.get(path, path.replace(".", "_"))
            members = block if path in feed_forward else ()
            sites.append(Site(name, index, role, d_in, d_out, module.bias is not None, name, members))
    if "attention" in kinds and not attends:
        raise BadInput(
            f"no attention projections found in {type(model).__name__} by their names (latent and linear attention are "
            "not known); name projections with --targets re:REGEX"
        )
    if not sites:
        raise BadInput(f"{_nothing(kinds, targets, ignore)} in {type(model).__name__}")
    return _share_inputs(sites)


def kinds_named(targets: Sequence[str]) -> set[Target]:
    """Return the kinds of blocks that `targets` names; without targets it is ffn."""
    named = {kind for one in targets or ("ffn",) for kind in KINDS.get(one, ())}
    return {kind for kind in TARGETS if kind in named}


def _nothing(kinds: set[Target], targets: Sequence[str], ignore: Sequence[str]) -> str:
    if not ignore or not kinds:
        return "no projection matches --targets"
    return f"every {'projection that --targets names' if targets else 'feed-forward projection'} is ignored"


def family_of(model: PreTrainedModel) -> Family | None:
    """Return the FAMILIES entry of the text tower's architecture, or else the result of `detect`."""
    return FAMILIES.get(text_config(model.config).model_type) or detect(model)


def _block(layer: nn.Module, roles: Mapping[str, str], name: str, known: bool) -> tuple[str, ...]:
    """Return the names of the projections of a layer's feed-forward block; () if its neurons cannot be pruned.

    They cannot where another module of the layer has a parameter for each neuron (a norm between up and down), or where
    the layout of a fused gate_up is unknown, because the architecture is not in FAMILIES (`known`).
    """
    down = next((path for path, role in roles.items() if role == "down"), None)
    if down is None or (not known and "gate_up" in roles.values()):
        return ()
    try:
        width = linear_shape(layer.get_submodule(down))[0]
    except (AttributeError, ValueError):  # this layer has no such projection
        return ()
    own = tuple(f"{path}." for path in roles)
    others = [p for path, p in layer.named_parameters() if not path.startswith(own)]
    if any(p.dim() == 1 and len(p) == width for p in others):
        return ()
    return tuple(f"{name}.{path}" for path in roles)


def detect(model: PreTrainedModel) -> Family | None:
    """Find the feed-forward projections of an unknown architecture by their shapes; None if there are none.

    Only linears that mix no tokens count, in the first block that has a match: `down` maps the widest inner size F back
    to the hidden size; linears from the hidden size to F are `up` (and `gate`, if two), one to 2F is a fused `gate_up`.
    """
    hidden = _hidden_size(model)
    kinds: set[tuple[type, frozenset[tuple[str, tuple[int, int]]]]] = set()
    for layer in blocks(model).values():
        shapes = {
            name: linear_shape(module)
            for name, module in layer.named_modules()
            if is_linear(module) and not mixes_tokens(layer, name, hidden)
        }
        kind = (type(layer), frozenset(shapes.items()))
        if kind not in kinds and (family := _family(shapes, hidden)) is not None:
            return family
        kinds.add(kind)
    return None


def _family(shapes: Mapping[str, tuple[int, int]], hidden: int | None) -> Family | None:
    """Return the feed-forward projections among the linears of one block, given by path and shape (d_in, d_out)."""
    if not shapes:
        return None
    hidden = hidden or Counter(d_in for d_in, _ in shapes.values()).most_common(1)[0][0]
    downs = {name: d_in for name, (d_in, d_out) in shapes.items() if d_out == hidden and d_in > hidden}
    if not downs:
        return None
    down, inner = max(downs.items(), key=lambda item: item[1])
    ups = [name for name, shape in shapes.items() if shape == (hidden, inner)]
    fused = [name for name, shape in shapes.items() if shape == (hidden, 2 * inner)]
    if len(ups) == 1:
        return Family({"up": ups[0], "down": down})
    if len(ups) == 2:
        gate = next((name for name in ups if "gate" in name), ups[0])
        return Family({"gate": gate, "up": next(name for name in ups if name != gate), "down": down})
    return Family({"gate_up": fused[0], "down": down}) if len(fused) == 1 else None


def _hidden_size(model: PreTrainedModel) -> int | None:
    size = getattr(text_config(model.config), "hidden_size", None)
    return size if isinstance(size, int) else None


def mixes_tokens(layer: nn.Module, path: str, hidden: int | None) -> bool:
    """Return True if the projection at `path` of `layer` belongs to a module that mixes tokens.

    Such modules are attention, convolutions, state-space and other recurrent mixers. They show in a module around the
    projection that has heads or a state, a convolution over time, or parameters of its own whose size is not `hidden`
    (decay rates, state matrices).
    """
    parts = path.split(".")[:-1]
    for depth in range(1, len(parts) + 1):
        module = layer.get_submodule(".".join(parts[:depth]))
        if "att" in parts[depth - 1].lower() or "attention" in type(module).__name__.lower():
            return True
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            return True
        own = (parameter for parameter in module._parameters.values() if parameter is not None)
        if HEADS & module.__dict__.keys() or any(size not in (1, hidden) for one in own for size in one.shape):
            return True
    return False


def _matches(name: str, module: nn.Module, patterns: Sequence[str]) -> bool:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                hit = re.match(pattern[3:], name) is not None
            except re.error as error:
                raise BadInput(f"{pattern!r} is not a regular expression: {error}") from None
        else:
            hit = pattern in (name, type(module).__name__) or target_of(name) in KINDS.get(pattern, ())
        if hit:
            return True
    return False


def _share_inputs(sites: list[Site]) -> list[Site]:
    """Give projections of one layer that read the same the name of the first of them as `input`."""
    found = sites
    for roles in (("gate", "up"), READERS):
        first = {site.layer: site.name for site in reversed(found) if site.role in roles}
        found = [replace(site, input=first[site.layer]) if site.role in roles else site for site in found]
    return found
