"""A recipe: everything that decides a conversion, checked on reading, with the file and line of what is wrong.

Recipes are YAML files with the fields of `Recipe` below.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from pilon_compress.config import reading, strict_yaml
from pilon_compress.config.conflicts import refuse_conflicts
from pilon_compress.config.ratio import Ratio
from pilon_compress.config.reading import Positive, Section, Selector, Switch, Text
from pilon_compress.config.strict_yaml import Document
from pilon_compress.errors import BadInput

Method = Literal["pilon", "whitened-svd", "svd"]
Preset = Literal["minimal", "baseline", "mild", "moderate", "aggressive", "extreme"]
PRESETS: dict[Preset, float] = {
    "minimal": 0.9,
    "baseline": 0.75,
    "mild": 0.6,
    "moderate": 0.5,
    "aggressive": 0.25,
    "extreme": 0.1,
}
DEFAULT_RATIO = 0.5
LARGEST_RATIO = 4.0  # with allow_larger: enough for a full-rank plan of any shape


class Budget(Section):
    """How large the result may be."""

    allow_larger: Switch = False  # declared first: the check of ffn_ratio reads it
    """Permit a plan larger than the dense model (ffn_ratio up to 4), for tests and study."""
    ffn_ratio: Ratio | None = None
    """Stored FFN parameters, PILON over dense, at most: above 0, at most 1; also as 50% or 1/2. Default 0.5, or what
    n_primitives and rank come to where both are given. Not together with preset."""
    preset: Preset | None = None
    """A named ffn_ratio: minimal .9, baseline .75, mild .6, moderate .5, aggressive .25, extreme .1."""
    neurons: Switch = True
    """Prune neurons of feed-forward blocks and refit the others; false: keep every neuron, lower ranks alone."""
    sharing: Literal["auto", "none"] = "none"
    """auto: bands of layers share banks where a joint fit has the lower loss; costs time, and MACs where it does."""
    banding: Literal["contiguous", "similar"] = "contiguous"
    """Which layers sharing tries together: about three in a row, or two to four that use the same directions."""
    align: Switch = False
    """Match the neurons of layers that share before their banks are fitted."""
    optimize: Literal["storage", "compute"] = "storage"
    """storage: MACs may be up to the dense model's. compute: the ratio of MACs is at most that of stored parameters."""
    mac_ratio: Annotated[Ratio, Field(gt=0, le=1)] | None = None
    """Limit on the FFN's MACs per token, PILON over dense. Not together with optimize: compute."""
    bands: Positive | list[list[int]] | None = None
    """Bands of layers that share banks: their number, or the layers of each. Default: about three layers each."""
    n_primitives: Positive | None = None
    """Primitives per bank; solved from the ratio when not given."""
    rank: Positive | None = None
    """Rank of each primitive; solved from the ratio when not given."""
    top_k: Positive | None = None
    """Primitives that each layer selects from its bank; by default as many as cost no more MACs than dense."""

    @model_validator(mode="before")
    @classmethod
    def _default_ratio(cls, data: Any) -> Any:
        fixed = isinstance(data, dict) and None not in (data.get("n_primitives"), data.get("rank"))
        fixed = fixed and data.get("optimize") != "compute"  # whose limit on MACs is the ratio
        if isinstance(data, dict) and data.get("ffn_ratio") is None and data.get("preset") is None and not fixed:
            return {**data, "ffn_ratio": DEFAULT_RATIO}
        return data

    @field_validator("ffn_ratio")
    @classmethod
    def _in_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        larger = info.data.get("allow_larger", False)
        if value is not None and not 0 < value <= (LARGEST_RATIO if larger else 1):
            limit = f"at most {LARGEST_RATIO:g}" if larger else "at most 1, the dense size, without allow_larger"
            raise ValueError(f"must be above 0 and {limit}")
        return value

    @field_validator("preset")
    @classmethod
    def _only_one(cls, value: Preset | None, info: ValidationInfo) -> Preset | None:
        if value is not None and info.data.get("ffn_ratio") is not None:
            raise ValueError("give ffn_ratio or preset, not both")
        return value

    @field_validator("bands", mode="before")
    @classmethod
    def _bands(cls, value: Any) -> Any:
        def count(x: Any) -> bool:
            return isinstance(x, int) and not isinstance(x, bool) and x >= 0

        def band(x: Any) -> bool:
            return isinstance(x, list) and bool(x) and all(map(count, x))

        lists = isinstance(value, list) and bool(value) and all(map(band, value))
        if value is None or lists or (count(value) and value > 0):
            return value
        raise ValueError("must be a number of bands, or the layers of each band, as in [[0, 1], [2, 3]]")

    @property
    def limits_storage(self) -> bool:
        """True if a ratio or preset bounds what is stored; False where n_primitives and rank alone decide."""
        return self.preset is not None or self.ffn_ratio is not None

    @property
    def mac_limit(self) -> float | None:
        """Upper bound of the FFN's MACs per token over dense; None where storage alone counts."""
        if self.mac_ratio is not None:
            return self.mac_ratio
        return min(1.0, self.ratio) if self.optimize == "compute" else None

    @property
    def ratio(self) -> float:
        """Stored FFN parameters, PILON over dense, whichever way it was given."""
        if self.preset is not None:
            return PRESETS[self.preset]
        return DEFAULT_RATIO if self.ffn_ratio is None else self.ffn_ratio


class Form(Section):
    """The PILON form that weights take."""

    composition: Literal["component", "scalar"] = "component"
    """Weights of a composition: one per component of each selected primitive, or one per primitive."""
    bank_dtype: Literal["auto", "int8", "int4", "int3", "int2"] = "auto"
    """Of banks and matrices: auto as everything else, or whole numbers, which each layer makes up for as it can."""


class Scope(Section):
    """Which projections are replaced: exact module name, class name, or re:REGEX on the module name."""

    targets: list[Selector] = []
    """Replace only these; empty: every feed-forward projection."""
    ignore: list[Selector] = []
    """Leave these dense; wins over targets."""


class Calibration(Section):
    """The text whose activations weigh the error."""

    data: Text | None = None
    """Text source: hub:REPO:CONFIG:SPLIT:COLUMN, a txt / jsonl / parquet file or glob (from the working directory),
    stdlib, stdin. Default: WikiText-2 for causal LMs, stdlib for encoders."""
    samples: Positive | None = None
    """Sequences to read: paragraphs for encoders, blocks of sequence_length tokens for causal LMs. Default: 800, and as
    many as make eight tokens per inner neuron, at least 32; fewer or more by effort."""
    sequence_length: Positive | None = None
    """Tokens per sequence, at most."""
    batch_size: Positive = 16
    """Sequences per forward pass."""
    begins_with: Text | None = None
    """Tokens that every sequence of a causal LM begins with, as `convert` saves them: those that the tokenizer puts
    before a text, or `nothing`. A recipe that names others than the tokenizer puts is refused."""


class Refine(Section):
    """Regression to the dense model on the calibration text, after the closed form."""

    steps: Annotated[int, Field(ge=0, strict=True)] = 0
    """Optimiser steps; 0: none (one-shot)."""
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Wall time at most. With a limit, results differ from run to run."""
    samples: Positive | None = None
    """Sequences to learn from, of the calibration source. Default: eight times those of the calibration."""


class Evaluation(Section):
    """The text that judges the result."""

    data: Text | None = None
    """Text source, as for calibration; none: do not evaluate. Default: the held-out part of the calibration source."""
    samples: Positive | None = None
    """Texts to compare for encoders, windows to score for causal LMs. Default: 500 texts; at the end of a conversion as
    many windows as make 16,384 tokens, in `eval` all of the text."""
    window: Positive | None = None
    """Tokens of context per window (causal LMs)."""
    stride: Positive | None = None
    """Tokens by which windows advance, at most the window (causal LMs). Default: the window."""
    batch_size: Positive = 16
    """Sequences per forward pass."""

    @field_validator("stride")
    @classmethod
    def _scores_every_token(cls, value: int | None, info: ValidationInfo) -> int | None:
        window = info.data.get("window")
        if value is not None and window is not None and value > window:
            raise ValueError(f"larger than the window of {window}: tokens would be skipped")
        return value

    def check_kind(self, causal: bool) -> None:
        """Raise BadInput for settings that the kind of model has no use for: windows of an encoder."""
        for name in ("window", "stride"):
            if not causal and getattr(self, name) is not None:
                raise BadInput(f"evaluation.{name} is for causal LMs, and this model is an encoder: leave it out")


class Recipe(Section):
    """Everything that decides a conversion."""

    model: Text
    """The dense model: hub id, local folder, or package:NAME of an installed Python package that ships a checkpoint."""
    method: Method = "pilon"
    """pilon, or a baseline for comparison: whitened-svd (SVD-LLM), svd."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """Seed of every random choice: sampling of texts, clustering."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the saved weights; auto keeps the dense model's."""
    device: Text = "auto"
    """Where to compute: auto (cuda when present, else cpu), cpu, cuda, cuda:1, ..."""
    max_memory: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """GiB that the conversion may use; a model that is large against it is read block by block. Default: what is
    free."""
    effort: Literal["fast", "balanced", "best"] = "balanced"
    """fast: every layer on its own, on a third of the text. balanced: each layer makes up for those before it. best:
    twice the text, longer joint fits. For method pilon."""
    budget: Budget = Budget()
    form: Form = Form()
    scope: Scope = Scope()
    calibration: Calibration = Calibration()
    refine: Refine = Refine()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _every_option_counts(self) -> "Recipe":
        refuse_conflicts(self)
        return self


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the bundled recipe of that name, else the YAML file at that path, and apply `overrides`, each "a.b=value".

    An override of ffn_ratio replaces the file's preset, and the other way round. Raises BadInput:
    `file.yaml:LINE: dotted.field: what is wrong`, or `--set a.b: ...` where an override is to blame.
    """
    return reading.load(Recipe, name_or_path, overrides, "train")


def build(data: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "command line") -> Recipe:
    """A recipe from nested dictionaries and `overrides`. `origin` begins the messages of BadInput."""
    return reading.checked(Recipe, Document(origin, data), overrides)


def evaluation(data: Mapping[str, Any], origin: str = "command line") -> Evaluation:
    """The settings of an evaluation on its own. Raises BadInput."""
    return reading.checked(Evaluation, Document(origin, data))


def dump(recipe: Recipe) -> str:
    """YAML that `load` turns back into an equal recipe: what differs from the defaults, and the main settings."""
    shown = {"model": recipe.model, "method": recipe.method, "seed": recipe.seed}
    shown |= recipe.model_dump(exclude_defaults=True)
    shown["budget"] = recipe.budget.model_dump(exclude_defaults=True)
    shown["calibration"] = recipe.calibration.model_dump(exclude_none=True)
    return strict_yaml.dump({field: shown[field] for field in Recipe.model_fields if field in shown})


def names() -> list[tuple[str, str]]:
    """The bundled recipes: (name, one-line description from the file's first comment)."""
    return [(name, source(name).partition("\n")[0].lstrip("# ")) for name in reading.bundled()]


def kind(name_or_path: str) -> str:
    """Which command a recipe is for: `train` or `convert`. Raises BadInput for a file that cannot be read."""
    origin, text = reading.find(name_or_path)
    return reading.kind(strict_yaml.parse(text, origin)) or "convert"


def source(name_or_path: str) -> str:
    """The recipe's YAML as written, comments included. Raises BadInput when there is none of that name."""
    return reading.find(name_or_path)[1]


def schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors: the contents of recipes/recipe.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
