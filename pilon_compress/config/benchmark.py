"""A benchmark of one feed-forward block, or of a whole model."""

import re
from typing import Annotated, Literal

from pydantic import field_validator, model_validator

from pilon_compress.config.conflicts import refuse_field
from pilon_compress.config.fields import Device
from pilon_compress.config.flat import Flat
from pilon_compress.config.option import RUNNING, Argument, Option
from pilon_compress.config.reading import Positive, Switch, Text
from pilon_compress.config.tiers import Tier

BLOCK = "Shape of one block"
OTHER = "Another runtime"
LLAMA_CPP = "llama.cpp"


class BenchConfig(Flat):
    """Settings of a benchmark."""

    ffn: Annotated[Text | None, Option(panel=BLOCK, metavar="WIDTHxHIDDEN")] = None
    """Width and hidden width of one block, as in 768x3072, in place of a model. Default: a model is timed."""
    active_rank: Annotated[Positive | None, Option(panel=BLOCK)] = None
    """Components that are computed (k·r), a multiple of `rank`. Default: a quarter of the width."""
    rank: Annotated[Positive, Option(panel=BLOCK)] = 16
    """Rank of a primitive. Ternary kernels read primitives in place where it is a multiple of 16, else side by side."""
    top_k: Annotated[Positive | None, Option(panel=BLOCK)] = None
    """Primitives that are selected. Default: as many as make up `active_rank`."""
    gated: Annotated[Switch, Option(panel=BLOCK)] = False
    """Time a block with a gate, as Llama has it."""
    activation: Annotated[Literal["relu2", "relu", "silu", "gelu", "gelu_tanh"] | None, Option(panel=BLOCK)] = None
    """Activation of the block. Default: relu2, or silu with `gated`."""
    batch: Annotated[Positive, Option()] = 1
    """Tokens (of a block) or sequences (of a model) that are computed at once."""
    context: Annotated[Positive, Option()] = 128
    """Tokens that a model reads before it decodes one."""
    rounds: Annotated[Positive, Option()] = 20
    """Times that every variant has its turn."""
    variants: Annotated[list[Text], Option()] = []
    """Time only these variants, besides dense_fp32. Default: all."""
    against: Annotated[Text | None, Option(panel=OTHER, metavar="RUNTIME[:TYPES]")] = None
    """Time the model against another runtime on the CPU: llama.cpp, or llama.cpp:q4_0,q8_0 for the types of its file.
    Each side runs in processes of its own, in turns, and loads the model anew up to five times. Default: none, variants
    are timed; types q4_0 and q8_0."""
    dense: Annotated[Text | None, Option(panel=OTHER, metavar="MODEL")] = None
    """Dense model that the other runtime gets. Default: the one that the folder's recipe.yaml leads to."""
    threads: Annotated[Positive | None, Option(panel=RUNNING)] = None
    """CPU threads. Default: as many as torch takes."""
    tier: Annotated[Tier | None, Option(panel=RUNNING, metavar="FIELD=VALUE")] = None
    """Time the model in tiers, too, with this share of each bank's primitives in memory, as in n_hot=0.25
    (docs/tiers.md). Default: none."""
    device: Device = "auto"

    @field_validator("ffn")
    @classmethod
    def _is_shape(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", value):
            raise ValueError("must be WIDTHxHIDDEN, as in 768x3072")
        return value

    @model_validator(mode="after")
    def _one_way_to_time(self) -> "BenchConfig":
        if self.against is None:
            return self
        runtime, colon, _ = self.against.partition(":")
        if runtime != LLAMA_CPP or (colon and not all(self.types)):
            refuse_field("against", "must be llama.cpp, or llama.cpp:TYPES as in llama.cpp:q4_0,q8_0", self.against)
        if len(set(self.types)) < len(self.types):
            refuse_field("against", "names a type twice", self.against)
        for name, idle in (("ffn", None), ("variants", []), ("batch", 1), ("tier", None)):
            if getattr(self, name) != idle:
                refuse_field(name, "has no effect with against: leave out one of the two", getattr(self, name))
        return self

    @property
    def types(self) -> list[str]:
        """Types of the other runtime's files, as `against` names them; empty where it names none."""
        return (self.against or "").partition(":")[2].split(",") if ":" in (self.against or "") else []

    @model_validator(mode="after")
    def _sizes_agree(self) -> "BenchConfig":
        if self.ffn is not None and self.tier is not None:
            refuse_field("tier", "is for a model, and ffn for a block: leave out one of the two", self.tier)
        if self.top_k is not None and self.active_rank not in (None, self.top_k * self.rank):
            active = self.top_k * self.rank
            refuse_field("top_k", f"of rank {self.rank} makes {active} components, not active_rank", self.top_k)
        if self.active_rank is not None and self.active_rank % self.rank:
            refuse_field("active_rank", f"must be a multiple of rank {self.rank}", self.active_rank)
        return self


class BenchCommand(BenchConfig):
    """Everything that decides a benchmark."""

    model: Annotated[Text | None, Argument()] = None
    """PILON folder to time. Leave it out to time one block of the shape `ffn`."""
