"""Sections about experts: `ffn.moe` of a training recipe, recipes over one bank; `form.moe` of a conversion, slices."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pilon_compress.config.pairs import fields_of
from pilon_compress.config.reading import Count, Number, Positive, Section

SLICES = 8  # of a block's neurons where `active` alone is given


class ExpertsConfig(Section):
    """Experts of each feed-forward block: recipes over the bank of its band, of which a router chooses per token."""

    experts: Positive = 8
    """Experts of each block, beside the shared ones."""
    top_k: Positive = 2
    """Experts that compute a token; their weights sum to 1."""
    router: Literal["linear", "mlp"] = "linear"
    """Router: a linear map of the block's input, or an MLP with a hidden layer of a quarter of its width."""
    shared: Count = 0
    """Further experts that compute every token, with weight 1."""
    mix: Literal["outputs", "recipes"] = "outputs"
    """Add the chosen experts, weighted: their outputs (each computes the token), or their recipes, the
    coefficients over one selection of primitives (the block computes the token once)."""
    balance: Number = 0.01
    """Weight of the load-balancing loss (Switch Transformer), the mean over blocks."""
    z_loss: Number = 0.001
    """Weight of the router's z-loss: the mean squared logsumexp of its logits (ST-MoE)."""
    bias_rate: Number = 0.0
    """Step by which the choice of an expert is made easier or harder after each training step, while its load is below
    or above the mean (DeepSeek-V3's balancing without a loss; 0.001 there). Default: 0, off."""

    @property
    def recipes(self) -> int:
        """Return the recipes of a block, shared ones included."""
        return self.experts + self.shared

    @property
    def passes(self) -> int:
        """Return how often a block computes a token."""
        return self.top_k + self.shared if self.mix == "outputs" else 1

    @property
    def mixed(self) -> int:
        """Return the recipes that are mixed for every token: 0 where outputs are."""
        return self.recipes if self.mix == "recipes" else 0


def read_experts(value: Any) -> Any:
    """Return the fields of "experts=4,top_k=2"; anything but such a text as it is, for pydantic to check."""
    return fields_of(value, "--moe", "experts=8,top_k=2")


Experts = Annotated[ExpertsConfig, BeforeValidator(read_experts)]


class SlicesConfig(Section):
    """Experts of a conversion: each feed-forward block keeps all its neurons, in slices of equal size.

    The shared slices compute every token; of the others, the experts, a router chooses `top_k` for each token.
    """

    active: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Share of the neurons that compute a token: eighths, half of them shared, unless the three numbers below are
    given. Default: 0.5, or what they come to."""
    experts: Positive | None = None
    """Slices of which a router chooses; given together with `shared` and `top_k`."""
    shared: Count | None = None
    """Slices that compute every token: the neurons that are active most often."""
    top_k: Positive | None = None
    """Experts that compute a token."""
    router: Literal["linear", "neurons"] = "linear"
    """Router: linear, a ridge regression of the experts' contributions on the block's input; or neurons, which computes
    one neuron of each expert and stores no weights (CMoE)."""

    @model_validator(mode="after")
    def _in_range(self) -> "SlicesConfig":
        given = [one for one in (self.experts, self.shared, self.top_k) if one is not None]
        if given and len(given) < 3:
            raise ValueError("needs experts, shared and top_k together, or active alone")
        if not given and abs(self._computed - round(self._computed)) > 1e-9:
            raise ValueError(
                f"has active {self._computed / SLICES:g}, which is no number of {SLICES} slices: give experts, shared "
                "and top_k"
            )
        experts, shared, top_k = self.shape
        if experts < 2:
            raise ValueError("needs two experts or more, to choose from")
        if top_k > experts:
            raise ValueError(f"has top_k {top_k}, more than its {experts} experts")
        if self.active is not None and abs(self.active - self.share) > 1e-9:
            raise ValueError(f"has active {self.active:g}, and {self.share:g} by its other numbers: leave out one")
        return self

    @property
    def _computed(self) -> float:
        return SLICES * (0.5 if self.active is None else self.active)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the experts, the shared slices, and the experts that compute a token."""
        if self.experts is not None and self.shared is not None and self.top_k is not None:
            return self.experts, self.shared, self.top_k
        computed = round(self._computed)
        shared = min(computed // 2, SLICES - 2)
        return SLICES - shared, shared, computed - shared

    @property
    def share(self) -> float:
        """Return the share of a block's neurons that compute a token."""
        experts, shared, top_k = self.shape
        return (shared + top_k) / (shared + experts)


Slices = Annotated[SlicesConfig, BeforeValidator(read_experts)]


def expert_conflicts(experts: ExpertsConfig) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for numbers that contradict each other."""
    if experts.experts < 2:
        yield "ffn.moe", "needs two experts or more, to choose from"
    elif experts.top_k > experts.experts:
        yield "ffn.moe", f"has top_k {experts.top_k}, more than its {experts.experts} experts"
