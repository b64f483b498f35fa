"""Recipes of a conversion: their fields, checks that need several fields, reading and writing.

Recipes are YAML files with the fields of `Recipe` below.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from pilon_compress.config import reading, strict_yaml
from pilon_compress.config.conflicts import conflicts, refuse_conflicts, refuse_field
from pilon_compress.config.fields import MODEL, SOURCES, Device, DType
from pilon_compress.config.flat import Flat, arranged
from pilon_compress.config.option import RUNNING, Argument, Option, Options
from pilon_compress.config.ratio import Part, SizeRatio
from pilon_compress.config.reading import Override, Positive, Section, Selector, Switch, Text
from pilon_compress.config.strict_yaml import Document
from pilon_compress.errors import BadInput

Method = Literal["pilon", "whitened-svd", "svd"]
DEFAULT_RATIO = 0.5
LARGEST_RATIO = 4.0  # with allow_larger: enough for a full-rank plan of any shape


class Budget(Section):
    """The size of the result."""

    ffn_ratio: Annotated[SizeRatio | None, Option(metavar="RATIO")] = None
    """Largest ratio of stored FFN parameters, PILON over dense: a number above 0 and at most 1, as in 0.5, 50% or 1/2,
    or a preset: minimal 0.9, baseline 0.75, mild 0.6, moderate 0.5, aggressive 0.25, extreme 0.1. Default: 0.5, or what
    `n_primitives` and `rank` come to if both are given."""
    allow_larger: Annotated[Switch, Option()] = False
    """Permit a plan that is larger than the dense model, for tests and study: `ffn_ratio` may be up to 4."""
    optimize: Annotated[Literal["storage", "compute"], Option()] = "storage"
    """Size to limit. With storage MACs may be up to the dense model's; with compute the ratio of MACs is at most that
    of stored parameters."""
    mac_ratio: Annotated[Part | None, Option(metavar="RATIO")] = None
    """Largest ratio of the FFN's MACs per token, PILON over dense: above 0 and at most 1. Not together with `optimize`
    compute. Default: as `optimize` says."""
    neurons: Switch = True
    """Prune neurons of feed-forward blocks and refit the others. If false, all neurons stay: only ranks are lowered."""
    sharing: Literal["auto", "none"] = "none"
    """With auto, bands of about three layers share banks where a joint fit lowers the loss. It costs time, and MACs
    where layers share."""
    bands: Annotated[Positive | list[list[int]] | None, Option(metavar="BANDS")] = None
    """Bands of layers that share banks: their number, or the layers of each, as in [[0, 1], [2, 3]]. Default: bands of
    about three layers."""
    n_primitives: Annotated[Positive | None, Option()] = None
    """Primitives per bank. Default: as many as `ffn_ratio` pays for."""
    rank: Annotated[Positive | None, Option()] = None
    """Rank of each primitive. Default: the rank that spends `ffn_ratio` best."""
    top_k: Annotated[Positive | None, Option()] = None
    """Primitives that each layer selects from its bank. Default: as many as cost no more MACs than the dense layer."""

    @model_validator(mode="before")
    @classmethod
    def _default_ratio(cls, data: Any) -> Any:
        fixed = isinstance(data, dict) and None not in (data.get("n_primitives"), data.get("rank"))
        fixed = fixed and data.get("optimize") != "compute"  # whose limit on MACs is the ratio
        if isinstance(data, dict) and data.get("ffn_ratio") is None and not fixed:
            return {**data, "ffn_ratio": DEFAULT_RATIO}
        return data

    @model_validator(mode="after")
    def _in_range(self) -> "Budget":
        limit = LARGEST_RATIO if self.allow_larger else 1
        if self.ffn_ratio is not None and not 0 < self.ffn_ratio <= limit:
            words = f"at most {limit:g}" + (
                "" if self.allow_larger else ", the dense size, without budget.allow_larger"
            )
            refuse_field("ffn_ratio", f"must be above 0 and {words}", self.ffn_ratio)
        return self

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
        """True if a ratio bounds what is stored; False where n_primitives and rank alone decide."""
        return self.ffn_ratio is not None

    @property
    def mac_limit(self) -> float | None:
        """Upper bound of the FFN's MACs per token over dense; None where storage alone counts."""
        if self.mac_ratio is not None:
            return self.mac_ratio
        return min(1.0, self.ratio) if self.optimize == "compute" else None

    @property
    def ratio(self) -> float:
        """Largest ratio of stored FFN parameters, PILON over dense."""
        return DEFAULT_RATIO if self.ffn_ratio is None else self.ffn_ratio


class Form(Section):
    """Form and number format of the converted weights."""

    composition: Annotated[Literal["component", "scalar"], Option()] = "component"
    """Weights of a composition: one per component of each selected primitive, or one per primitive (scalar)."""
    bank_dtype: Annotated[Text, Option()] = "auto"
    """Number format of banks and dense matrices: int8, int4, int3, int2, or another that is registered. They are then
    quantised, and every layer is refitted to compensate. With auto it is that of the other weights."""


class Scope(Section):
    """The projections to replace: exact module names, class names, or re:REGEX on the module name."""

    targets: Annotated[list[Selector], Option()] = []
    """Replace only these modules: exact name, class name, or re:REGEX on the name. Default: every feed-forward
    projection."""
    ignore: Annotated[list[Selector], Option()] = []
    """Keep these modules dense, also those that `targets` names. Default: none."""


class CalibrationConfig(Section):
    """The text whose activations weigh the error."""

    data: Annotated[Text | None, Option("--calibration", metavar="SOURCE", tail=SOURCES)] = None
    """Text for calibration: a source such as hub:REPO:CONFIG:SPLIT:COLUMN, a file, or a glob from the working
    directory. Default: WikiText-2 for causal LMs, stdlib for encoders."""
    samples: Annotated[Positive | None, Option()] = None
    """Calibration sequences: paragraphs for encoders, blocks of `sequence_length` tokens for causal LMs. Default, with
    effort balanced: 800 paragraphs, or as many blocks as make eight tokens per inner neuron, at least 32."""
    sequence_length: Annotated[Positive | None, Option()] = None
    """Largest number of tokens per calibration sequence. Default: 512 for causal LMs, 128 for encoders, or what the
    model has positions for if that is less."""
    batch_size: Annotated[Positive, Option()] = 16
    """Calibration sequences per forward pass."""
    begins_with: Text | None = None
    """Tokens that every sequence of a causal LM begins with, as `convert` saves them: those that the tokenizer puts
    before a text, or `nothing`. A recipe that names others than the tokenizer puts is refused."""


class RefineConfig(Section):
    """Training of the converted model to agree with the dense one, after the closed form."""

    steps: Annotated[int, Field(ge=0, strict=True), Option("--refine", RUNNING)] = 0
    """Optimiser steps that train the converted model to agree with the dense one, after the closed form; 0: none."""
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest wall time in minutes. With a limit, results differ from run to run. Default: no limit."""
    samples: Positive | None = None
    """Sequences to learn from, of the calibration source. Default: eight times those of the calibration."""


class Evaluation(Section):
    """The text that the result is evaluated on."""

    data: Annotated[Text | None, Option(metavar="SOURCE", tail=SOURCES)] = None
    """Text to evaluate on: a source such as hub:REPO:CONFIG:SPLIT:COLUMN, a file, or a glob; in a conversion, none
    skips the evaluation. Default: the held-out part of the calibration text; in `eval`, of a model without a recipe,
    WikiText-2 for causal LMs and stdlib for encoders."""
    samples: Annotated[Positive | None, Option()] = None
    """Texts to compare for encoders, windows to score for causal LMs. Default: 500 texts; in `eval` the windows of all
    of the text, else as many as make 16,384 tokens."""
    window: Annotated[Positive | None, Option()] = None
    """Tokens of context per window (causal LMs). Default: as many as the model has positions for, at most 1024."""
    stride: Annotated[Positive | None, Option()] = None
    """Tokens by which windows advance, at most the window (causal LMs). Default: the window."""
    batch_size: Annotated[Positive, Option()] = 16
    """Sequences per forward pass of the evaluation."""

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


class Dense(Section):
    """The model to convert."""

    model: Annotated[Text, Field(description=f"Dense model to convert: {MODEL}"), Argument()]


class General(Section):
    """Fields of a conversion that belong to no section."""

    method: Annotated[Method, Option(panel="Form")] = "pilon"
    """Method of the conversion: pilon, or for comparison a baseline that factorises every weight alone: whitened-svd
    (SVD-LLM) or svd."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True), Option(panel=RUNNING)] = 0
    """Seed of every random choice: which texts are drawn, how layers are clustered."""
    dtype: Annotated[DType, Option(panel=RUNNING)] = "auto"
    """Number type of the saved weights; auto keeps the dense model's."""
    device: Device = "auto"
    max_memory: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, Option(panel=RUNNING, metavar="GIB")
    ] = None
    """Memory in GiB that the conversion may use; a model that is large against it is read block by block. Default: the
    memory that is free."""
    effort: Annotated[Literal["fast", "balanced", "best"], Option(panel=RUNNING)] = "balanced"
    """Time to spend (method pilon). With fast every layer is fitted on its own, on less than half of the text; with
    balanced each is fitted behind the converted ones before it; best reads two to four times the text, and fits shared
    banks longer."""


class Recipe(General, Dense):
    """Everything that decides a conversion."""

    MOVED: ClassVar[dict[str, str]] = {"budget.preset": "budget.ffn_ratio"}

    budget: Annotated[Budget, Options("Budget")] = Budget()
    form: Annotated[Form, Options("Form")] = Form()
    scope: Annotated[Scope, Options("What is replaced")] = Scope()
    calibration: Annotated[CalibrationConfig, Options("Calibration and evaluation")] = CalibrationConfig()
    refine: Annotated[RefineConfig, Options(RUNNING)] = RefineConfig()
    evaluation: Annotated[
        Evaluation, Options("Calibration and evaluation", prefix="eval-", only=("data", "samples"))
    ] = Evaluation()

    @model_validator(mode="after")
    def _every_option_counts(self) -> "Recipe":
        refuse_conflicts(self, conflicts(self))
        return self


class ConvertConfig(Flat, Budget, Form, Scope, General):
    """A conversion as Python programs ask for it: the fields of a recipe, those of `budget`, `form` and `scope` flat.

    Raises BadInput for an unknown field, a value that is out of range, and fields that exclude each other.
    """

    calibration: CalibrationConfig = CalibrationConfig()
    refine: RefineConfig = RefineConfig()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _every_option_counts(self) -> "ConvertConfig":
        self.recipe("model")
        return self

    def recipe(self, model: str, calibration: str | None = None, evaluation: str | None = None) -> Recipe:
        """Return the recipe that converts `model`; text sources that are given take the place of those named here."""
        given = {"calibration": {"data": calibration}, "evaluation": {"data": evaluation}}
        return arranged(self, Recipe, {"model": model}, given)


def load(name_or_path: str, overrides: Sequence[str | Override] = ()) -> Recipe:
    """Read the bundled recipe of that name, else the YAML file at that path, and apply `overrides`, each "a.b=value".

    Raises BadInput: `file.yaml:LINE: dotted.field: what is wrong`, or `--set a.b: ...` where an override is to blame.
    """
    return reading.load(Recipe, name_or_path, overrides, "train")


def build(data: Mapping[str, Any], overrides: Sequence[str | Override] = (), origin: str = "command line") -> Recipe:
    """Return the recipe of nested dictionaries and `overrides`. `origin` begins the messages of BadInput."""
    return reading.checked(Recipe, Document(origin, data), overrides)


def dump(recipe: Recipe) -> str:
    """Return YAML that `load` reads as an equal recipe: what differs from the defaults, and the main settings."""
    shown = {"model": recipe.model, "method": recipe.method, "seed": recipe.seed}
    shown |= recipe.model_dump(exclude_defaults=True)
    shown["budget"] = recipe.budget.model_dump(exclude_defaults=True)
    shown["calibration"] = recipe.calibration.model_dump(exclude_none=True)
    return strict_yaml.dump({field: shown[field] for field in Recipe.model_fields if field in shown})


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, for editors: the contents of recipes/recipe.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
