"""Sizes of a model: parameters, bytes, multiply-accumulates, and where they lie."""

from pilon_compress.results.base import Result


class Ratios(Result):
    """Sizes of a model, or a part of it, over those of the dense one."""

    stored_ratio: float
    """Parameters."""
    mac_ratio: float
    """Multiply-accumulates per token."""
    bytes_ratio: float | None = None
    """Bytes over the dense model's in bfloat16."""


class Sizes(Ratios):
    """Sizes of a PILON model, or a part of it, and of the dense one."""

    bytes_ratio: float
    """`bytes_ratio_to_bf16` under its older name."""
    bytes_ratio_to_source: float
    """Bytes over `source_bytes`, the dense model's in the dtype of its own file."""
    bytes_ratio_to_bf16: float
    """Bytes over the dense model's in bfloat16."""
    stored: int
    """Parameters, selected indices and scales."""
    dense_stored: int
    bytes: int
    """On disk."""
    dense_bytes: int
    """The dense model's in bfloat16."""
    macs: int
    """Multiply-accumulates per token of all products with weights."""
    dense_macs: int
    source_bytes: int
    shared_primitives: int | None = None
    """Primitives that two layers or more use; None where no model is at hand to count them."""


class Replaced(Result):
    """Sizes of what is replaced beside the feed-forward projections; unset where nothing is."""

    attention: Sizes | None = None
    """The attention projections that are replaced."""
    other: Sizes | None = None
    """Other projections that --targets names."""
    replaced_size: Sizes | None = None
    """All projections that are replaced, the feed-forward ones included."""


class Part(Result):
    """A bank with the projections that it makes, or a dense matrix."""

    names: list[str]
    """Names of the projections, below the base model."""
    role: str
    """up, gate, gate_up or down; router; q, k, v or qkv, and o of attention; neurons of a bank of neurons, which makes
    whole blocks (`d_out`, `top_k`: those of the widest layer)."""
    layers: list[int]
    d_in: int
    """Inputs as stored, after neurons were dropped."""
    d_out: int
    dense_d_in: int
    dense_d_out: int
    n_primitives: int | None
    """None, as the next three, for a dense matrix."""
    rank: int | None
    top_k: int | None
    composition: str | None
    experts: int | None = None
    """Recipes that each of its layers holds, of which a router chooses; None without a router."""
    active: int | None = None
    """Recipes that compute a token; None without a router."""
    quantization: str
    """none, or the number format of the weights."""
    bits: float
    """Bits of a weight."""
    stored: int
    bytes: int
    macs: int
    dense_stored: int
    dense_macs: int


class Share(Result):
    """Parameters below one place of a model, and their share of all."""

    name: str
    parameters: int
    share: float
