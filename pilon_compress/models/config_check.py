"""Check the sizes that a config declares before anything of that size is allocated."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from transformers import PretrainedConfig

from pilon_compress.errors import BadInput

MAX_LAYERS = 1000  # take seconds to build on the meta device; no text model comes near
MAX_EXPERTS = 100_000
MAX_SIZE = 2**40  # of any other integer
MAX_PARAMETERS = 1e13  # of the model, estimated

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Positive integers, or lists of positive integers by layer, where a config has them."""

OPTIONAL = ("intermediate_size", "num_key_value_heads", "head_dim", "type_vocab_size")
"""Integers from 0 on, or lists of them by layer; None is allowed."""


def check_declared(entries: Mapping[str, Any], name: str = "", depth: int = 8) -> None:
    """Raise BadInput if the contents of a config.json declare more layers or experts, or larger sizes, than the limits.

    Call it before transformers parses them into a config, which allocates lists of that length.
    """
    name = name or str(entries.get("model_type", "the model"))
    for key, value in entries.items():
        _check_bound(name, key, value)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Mapping) and depth:
                check_declared(part, name, depth - 1)


def check_shapes(config: PretrainedConfig) -> None:
    """Raise BadInput for a config whose model is impossible, or too large to build even without weights.

    Checks the config and those inside it: sizes must be positive integers, layers at most MAX_LAYERS, parameters at
    most MAX_PARAMETERS.
    """
    for part in _parts(config):
        name = part.model_type or type(part).__name__
        for key in REQUIRED:
            _check_size(name, key, _value(part, key), least=1)
        for key in OPTIONAL:
            _check_size(name, key, _value(part, key), least=0)
        for key, value in vars(part).items():
            _check_bound(name, key, value)
        _check_bound(name, "num_hidden_layers", _value(part, "num_hidden_layers"))
        if (size := _parameters(part)) > MAX_PARAMETERS:
            raise BadInput(f"config.json of {name} declares {size:.1g} parameters: too large to be read")


def _parts(config: PretrainedConfig, depth: int = 4) -> Iterator[PretrainedConfig]:
    """Yield the config and the configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig) and depth:
            yield from _parts(value, depth - 1)


def _value(config: PretrainedConfig, key: str) -> Any:
    """Return the config's attribute by its common name; None where the config has none, or one for each layer only."""
    own = (config.attribute_map or {}).get(key, key)
    if own in vars(config):
        return vars(config)[own]
    with suppress(Exception):  # properties raise exceptions of all kinds where layers differ
        return getattr(config, key, None)
    return None


def _check_size(name: str, key: str, value: Any, least: int) -> None:
    if isinstance(value, dict):  # by tower
        return
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if one is not None and (isinstance(one, bool) or not isinstance(one, int) or one < least):
            kind = "a positive integer" if least else "an integer, not negative"
            raise BadInput(f"config.json of {name}: {key} should be {kind} (got {_short(one)})")


def _check_bound(name: str, key: str, value: Any) -> None:
    """Raise BadInput for layer counts, expert counts and sizes beyond the limits."""
    if isinstance(value, bool) or not isinstance(value, int):
        return
    word = key.lower()
    limit = MAX_SIZE
    if word in ("n_layer", "depth") or word.endswith(("layers", "blocks")):
        limit = MAX_LAYERS
    elif "experts" in word:
        limit = MAX_EXPERTS
    if value > limit:
        raise BadInput(f"config.json of {name}: {key} is {_short(value)}, at most {limit} can be read")


def _parameters(config: PretrainedConfig) -> float:
    """Estimate the parameters: embeddings, attention and the feed-forward part of every block."""

    def size(key: str) -> float:
        value = _value(config, key)
        values = value if isinstance(value, (list, tuple)) else [value]
        return float(max((one for one in values if isinstance(one, int)), default=0))

    hidden, layers = size("hidden_size"), size("num_hidden_layers")
    heads = size("num_attention_heads") * size("head_dim")
    inner = size("intermediate_size")
    return hidden * (size("vocab_size") + layers * (inner + heads + hidden))


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, int) and abs(value) < 10**12 else f"{value!r:.40}"
    return text if len(text) < 40 else text[:39] + "…"
