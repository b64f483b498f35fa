"""Where the feed-forward projections live in each architecture: a table, and detection by shape for the rest."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.form.layout import linear_shape


@dataclass(frozen=True)
class Family:
    """`layers`: path of the layer list below the base model. `projections`: role -> path below one layer."""

    layers: str
    projections: dict[str, str]


GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
BERT = Family("encoder.layer", {"up": "intermediate.dense", "down": "output.dense"})

FAMILIES: dict[str, Family] = {
    "gpt2": Family("h", {"up": "mlp.c_fc", "down": "mlp.c_proj"}),
    "llama": Family("layers", GATED),
    "mistral": Family("layers", GATED),
    "qwen2": Family("layers", GATED),
    "qwen3": Family("layers", GATED),
    "gemma": Family("layers", GATED),
    "gemma2": Family("layers", GATED),
    "gemma3_text": Family("layers", GATED),
    "phi3": Family("layers", {"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}),
    "arcee": Family("layers", {"up": "mlp.up_proj", "down": "mlp.down_proj"}),
    "opt": Family("decoder.layers", {"up": "fc1", "down": "fc2"}),
    "gpt_neox": Family("layers", {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}),
    "bert": BERT,
    "roberta": BERT,
    "distilbert": Family("transformer.layer", {"up": "ffn.lin1", "down": "ffn.lin2"}),
}


@dataclass(frozen=True)
class Site:
    """One projection to replace: where it is and what it looks like."""

    name: str
    """Module name below the base model."""
    layer: int
    role: str
    """gate, up, down, gate_up (fused); for a projection outside the feed-forward block, its path with underscores."""
    d_in: int
    d_out: int
    bias: bool
    input: str
    """Name of the site whose input it shares: gate and up of one layer read the same activations."""
    block: int = 0
    """How many projections its feed-forward block has, replaced or not; 0: not known, or it is in none."""

    @property
    def parameters(self) -> int:
        return self.d_in * self.d_out + self.d_out * self.bias


def find_sites(model: PreTrainedModel, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Site]:
    """The projections of `model` (on any device, meta included) that would be replaced, in layer order.

    Without `targets` these are the feed-forward projections. `targets` and `ignore` are module names, class names, or
    `re:` followed by a regular expression that the module name must match from its start; names count from the base
    model. A target may name any linear projection inside a layer. Raises BadInput when nothing is left.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise BadInput(f"{model.config.model_type} is an encoder-decoder model, which is not supported")
    base = model.base_model
    family = FAMILIES.get(model.config.model_type) or detect(base)
    if family is None and not targets:
        raise BadInput(f"no feed-forward projections found in {type(model).__name__}; name them with --targets")
    layers_path = family.layers if family else _layer_list(base)
    layers = _layers(base, layers_path)
    roles = {path: role for role, path in family.projections.items()} if family else {}
    sites = []
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            wanted = _matches(f"{layers_path}.{index}.{path}", module, targets) if targets else path in roles
            if not wanted or not _is_linear(module):
                continue
            name = f"{layers_path}.{index}.{path}"
            if _matches(name, module, ignore):
                continue
            d_in, d_out = linear_shape(module)
            role = roles.get(path, path.replace(".", "_"))
            block = len(roles) if path in roles else 0
            sites.append(Site(name, index, role, d_in, d_out, module.bias is not None, name, block))
    if not sites:
        why = (
            "every feed-forward projection is ignored" if ignore and not targets else "no projection matches --targets"
        )
        raise BadInput(f"{why} in {type(model).__name__}")
    return _share_inputs(sites)


def detect(base: PreTrainedModel) -> Family | None:
    """Find the feed-forward projections of an unknown architecture by their shapes; None if there are none.

    Within one layer, and outside of what calls itself attention, `down` is the linear that maps the widest inner size F
    back to the hidden size; linears from the hidden size to F are `up` (and `gate`, if two), one to 2F is a fused
    `gate_up`.
    """
    path = _layer_list(base)
    if path is None:
        return None
    layer = _layers(base, path)[0]
    shapes = {name: linear_shape(m) for name, m in layer.named_modules() if _is_linear(m) and "att" not in name}
    if not shapes:
        return None
    hidden = getattr(base.config, "hidden_size", None) or Counter(s[0] for s in shapes.values()).most_common(1)[0][0]
    downs = {name: d_in for name, (d_in, d_out) in shapes.items() if d_out == hidden and d_in > hidden}
    if not downs:
        return None
    down, inner = max(downs.items(), key=lambda item: item[1])
    ups = [name for name, shape in shapes.items() if shape == (hidden, inner)]
    fused = [name for name, shape in shapes.items() if shape == (hidden, 2 * inner)]
    if len(ups) == 1:
        found = {"up": ups[0]}
    elif len(ups) == 2:
        gate = next((name for name in ups if "gate" in name), ups[0])
        found = {"gate": gate, "up": next(name for name in ups if name != gate)}
    elif len(fused) == 1:
        found = {"gate_up": fused[0]}
    else:
        return None
    return Family(path, {**found, "down": down})


def _layer_list(base: nn.Module) -> str | None:
    """Path of the longest list of equal layers that hold linears."""
    lists = [
        (len(module), name)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(_is_linear(m) for m in module[0].modules())
    ]
    return max(lists, key=lambda item: item[0])[1] if lists else None


def _layers(base: nn.Module, path: str | None) -> nn.ModuleList:
    if path is None:
        raise BadInput(f"{type(base).__name__} has no list of layers")
    try:
        layers = base.get_submodule(path)
    except AttributeError:
        raise BadInput(f"{type(base).__name__} has no layers at {path}") from None
    assert isinstance(layers, nn.ModuleList)
    return layers


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _matches(name: str, module: nn.Module, patterns: Sequence[str]) -> bool:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                hit = re.match(pattern[3:], name) is not None
            except re.error as error:
                raise BadInput(f"{pattern!r} is not a regular expression: {error}") from None
        else:
            hit = pattern in (name, type(module).__name__)
        if hit:
            return True
    return False


def _share_inputs(sites: list[Site]) -> list[Site]:
    """Give gate and up of one layer the same input name."""
    first = {site.layer: site.name for site in reversed(sites) if site.role in ("gate", "up")}
    return [
        Site(**{**vars(site), "input": first[site.layer]}) if site.role in ("gate", "up") else site for site in sites
    ]
