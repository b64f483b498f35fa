"""Result of an inspection: projections, sizes and costs."""

from typing import Literal

from pilon_compress.results.base import Result
from pilon_compress.results.evaluation import Evaluation
from pilon_compress.results.routing import Routing
from pilon_compress.results.sizes import Part, Replaced, Share, Sizes


class InspectedProjection(Result):
    """A projection: the dense one, and of a PILON model what is stored in its place."""

    name: str
    layer: int
    role: str
    d_in: int
    d_out: int
    parameters: int
    bytes: int
    macs: int
    bank: str | None
    """PILON: the bank's name, or the shape of a dense matrix; None for a projection that was not replaced."""
    kernel: str | None = None
    """PILON: the kernel that computes it on this machine; after "slow:" the reason why it is none."""
    neurons: int | None = None
    rank: int | None = None
    n_primitives: int | None = None
    top_k: int | None = None
    quantization: str | None = None
    bits: float | None = None


class InspectedBank(Sizes):
    """A bank with the projections that compose from it."""

    d_in: int
    d_out: int
    n_primitives: int
    rank: int
    quantization: str


class InspectedExit(Result):
    """The exit gate of a feed-forward block."""

    d: int
    threshold: float
    """Log of the predicted price, KL in nats, below which a token skips the block."""
    substitute: int
    """Rank of the linear map that answers in the block's place; 0: a constant."""


class Inspection(Replaced):
    """A model's projections, and what a conversion would replace or has replaced."""

    model: str
    architecture: str
    form: Literal["dense", "pilon"]
    dtype: str
    """Number format of the model's file."""
    parameters: int
    """Parameters of the dense model, which the figures below count, too."""
    macs: int
    """Multiply-accumulates per token."""
    replaced: int
    """Parameters of the projections."""
    replaced_macs: int
    projections: list[InspectedProjection]
    untouched: list[Share]
    """Experts and routers that stay as they are."""
    notes: list[str]
    """Sentences about `untouched`, the sizes and the kernels."""
    parts: list[Part] | None = None
    """PILON: banks and dense matrices, as all that follows."""
    banks: dict[str, InspectedBank] | None = None
    exits: dict[str, InspectedExit] | None = None
    """By module name of the block; None without gates."""
    source_dtype: str | None = None
    """Number format of the dense model's file."""
    routing: Routing | None = None
    """Figures of a model with experts on the validation text of its training; None where train.json has none."""
    ffn: Sizes | None = None
    model_size: Sizes | None = None
    evaluation: Evaluation | None = None
    """From the report beside the weights; None where there is none."""
