"""Configure how a causal LM continues a prompt."""

import math
from typing import Annotated

from pydantic import Field, model_validator

from pilon_compress.config.conflicts import refuse_field
from pilon_compress.config.fields import Device
from pilon_compress.config.option import Argument, Option
from pilon_compress.config.reading import Positive, Section, Switch, Text
from pilon_compress.config.tiers import Tier

COLDEST = 1e-3  # lowest temperature above 0: logits divided by less leave float32


class GenerateConfig(Section):
    """Everything that decides what a model generates, but the prompt."""

    model: Annotated[Text, Argument()]
    """Causal LM that continues the prompt, PILON or dense."""
    max_new_tokens: Annotated[Positive, Option()] = 64
    """Largest number of tokens to add."""
    temperature: Annotated[float | None, Option()] = None
    """Temperature of sampling; 0 always takes the most probable token. Default: 0, or 1 with `top_k` or `top_p`."""
    top_k: Annotated[Positive | None, Option()] = None
    """Sample from this many most probable tokens. Default: from all."""
    top_p: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Option()] = None
    """Sample from the most probable tokens that make up this share. Default: from all."""
    repetition_penalty: Annotated[float, Field(gt=0, lt=math.inf), Option()] = 1.0
    """Divisor of the logits of tokens that the text has already."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64, strict=True), Option()] = 0
    """Seed of sampling."""
    system: Annotated[Text | None, Option(metavar="MESSAGE")] = None
    """System message before the prompt, for models with a chat template. Default: none."""
    raw: Annotated[Switch, Option()] = False
    """Continue the prompt as it stands, even if the model has a chat template."""
    tier: Annotated[Tier | None, Option(metavar="FIELD=VALUE")] = None
    """Tiers: hold this share of each bank's primitives in memory, as in n_hot=0.25; the others stay in the model's
    files until they are used (docs/tiers.md). Default: none."""
    device: Device = "auto"

    @model_validator(mode="after")
    def _samples_or_not(self) -> "GenerateConfig":
        value = self.temperature
        if value is not None and not (value == 0 or COLDEST <= value < math.inf):
            refuse_field("temperature", f"must be 0 (greedy) or a number from {COLDEST} on", value)
        if value == 0 and self.narrowed:
            refuse_field("temperature", "0 does not sample, top_k and top_p do: leave out one of them", value)
        return self

    @property
    def narrowed(self) -> bool:
        """True if tokens are sampled from the most probable ones alone."""
        return self.top_k is not None or self.top_p is not None
