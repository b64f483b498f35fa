"""Recipes of a conversion: their fields, checks that need several fields, reading and writing.

Recipes are YAML files with the fields of `Recipe` below.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from pilon_compress.config import reading, strict_yaml
from pilon_compress.config.budget import Budget, with_default
from pilon_compress.config.conflicts import Context, Table, refuse_conflicts, refused, without_effect
from pilon_compress.config.experts import Slices
from pilon_compress.config.fields import MODEL, SOURCES, Device, DType
from pilon_compress.config.flat import Flat, arranged
from pilon_compress.config.option import RUNNING, Argument, Option, Options
from pilon_compress.config.reading import Override, Positive, Section, Selector, Switch, Text
from pilon_compress.config.strict_yaml import Document
from pilon_compress.errors import BadInput

Method = Literal["pilon", "whitened-svd", "svd"]


class Form(Section):
    """Form and number format of the converted weights."""

    composition: Annotated[Literal["component", "scalar"], Option()] = "component"
    """Weights of a composition: one per component of each selected primitive, or one per primitive (scalar)."""
    bank_dtype: Annotated[Text, Option()] = "auto"
    """Number format of banks and dense matrices: int8, int4, int3, int2, or another that is registered. They are then
    quantised, and every layer is refitted to compensate. With auto it is that of the other weights."""
    elastic: Annotated[Switch, Option()] = False
    """Store neurons and components in falling order of worth, with what a cut needs beside them: `keep` then loads or
    exports the file at any smaller size. `ffn_ratio` is the largest size, 1 for the dense model's."""
    moe: Annotated[Slices | None, Option(metavar="FIELD=VALUE,...")] = None
    """Experts without training: keep all neurons in slices, of which some compute every token and a router chooses
    others, as in active=0.25 or experts=7,shared=1,top_k=1 (CMoE, docs/moe.md). The stored size stays, MACs fall, and
    quality falls a lot. Default: none."""


class Scope(Section):
    """The projections to replace: kinds of blocks, exact module names, class names, or re:REGEX on the module name."""

    targets: Annotated[list[Selector], Option()] = []
    """Replace the projections of ffn, attention, or all of both; or only these modules: exact name, class name, or
    re:REGEX on the name. With attention the size is given as `ratio`, one budget for all. Default: ffn."""
    ignore: Annotated[list[Selector], Option()] = []
    """Keep these modules dense, also those that `targets` names, in the same words. Default: none."""


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

    MOVED: ClassVar[dict[str, str]] = {"budget.preset": "budget.ffn_ratio", "budget.sharing": "budget.share"}

    budget: Annotated[Budget, Options("Budget")] = Budget()
    form: Annotated[Form, Options("Form")] = Form()
    scope: Annotated[Scope, Options("What is replaced")] = Scope()
    calibration: Annotated[CalibrationConfig, Options("Calibration and evaluation")] = CalibrationConfig()
    refine: Annotated[RefineConfig, Options(RUNNING)] = RefineConfig()
    evaluation: Annotated[
        Evaluation, Options("Calibration and evaluation", prefix="eval-", only=("data", "samples"))
    ] = Evaluation()

    @model_validator(mode="before")
    @classmethod
    def _default_ratio(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("budget", {}), dict):
            return data
        scope = data.get("scope")
        targets = scope.get("targets") if isinstance(scope, dict) else getattr(scope, "targets", None)
        form = data.get("form")
        experts = form.get("moe") if isinstance(form, dict) else getattr(form, "moe", None)
        return {**data, "budget": with_default(data.get("budget", {}), targets, experts is not None)}

    @model_validator(mode="after")
    def _every_option_counts(self) -> "Recipe":
        refuse_conflicts(self, conflicts(self))
        return self


FIXED = Context[Recipe](
    lambda r: bool(r.budget.fixed_shape), lambda r: f"budget.{r.budget.fixed_shape[0]}, which fixes the banks' shape"
)
BASELINE = Context[Recipe](lambda r: r.method != "pilon", lambda r: f"method {r.method}")
SCALAR = Context[Recipe](lambda r: r.form.composition == "scalar", lambda _: "form.composition scalar")
LARGER = Context[Recipe](lambda r: r.budget.stored_limit > 1, lambda r: f"budget.{r.budget.ratio_name} above 1")
RANK = Context[Recipe](lambda r: r.budget.rank is not None, lambda _: "budget.rank")
WHOLE = Context[Recipe](
    lambda r: r.budget.stored_limit == 1, lambda r: f"budget.{r.budget.ratio_name} 1, which keeps every layer dense"
)
UNSHARED = Context[Recipe](
    lambda r: r.budget.sharing == "none" and not r.budget.fixed_shape, lambda _: "budget.share none"
)
MAC_RATIO = Context[Recipe](
    lambda r: r.budget.mac_ratio is not None, lambda _: "budget.mac_ratio, which sets the limit itself"
)
FACTORS = Context[Recipe](
    lambda r: not r.budget.whole, lambda _: "budget.whole_matrices and budget.uniform_width false"
)
MATRICES = Context[Recipe](lambda r: r.budget.whole, lambda _: "budget.whole_matrices or budget.uniform_width")
NEURONS = Context[Recipe](lambda r: r.budget.primitive == "neurons", lambda _: "budget.primitive neurons")
SLICED = Context[Recipe](lambda r: r.form.moe is not None, lambda _: "form.moe, which keeps the neurons as they are")
UNREFINED = Context[Recipe](lambda r: r.refine.steps == 0, lambda _: "refine.steps 0")
UNEVALUATED = Context[Recipe](lambda r: r.evaluation.data == "none", lambda _: "evaluation.data none")

TABLE: Table[Recipe] = {
    "method": (SLICED,),
    "budget.rank": (SLICED,),
    "budget.mac_ratio": (SLICED,),
    "budget.allow_larger": (SLICED,),
    "form.composition": (SLICED,),
    "form.bank_dtype": (SLICED,),
    "refine.steps": (SLICED,),
    "budget.share": (SLICED, FIXED, BASELINE, SCALAR, LARGER, WHOLE),
    "budget.neurons": (SLICED, FIXED, BASELINE, SCALAR, LARGER, NEURONS),
    "budget.primitive": (SLICED, FIXED, BASELINE, UNSHARED, SCALAR, LARGER, WHOLE),
    "budget.bands": (SLICED, BASELINE, UNSHARED, SCALAR, LARGER, WHOLE),
    "budget.n_primitives": (SLICED, BASELINE),
    "budget.top_k": (SLICED, BASELINE),
    "budget.rank_multiple": (SLICED, RANK, WHOLE, MATRICES, NEURONS),
    "budget.whole_matrices": (SLICED, FIXED, BASELINE, SCALAR, LARGER, WHOLE),
    "budget.uniform_width": (SLICED, FIXED, BASELINE, SCALAR, LARGER, WHOLE),
    "budget.multiple_of": (SLICED, FACTORS),
    "budget.optimize": (SLICED, MAC_RATIO),
    "form.elastic": (SLICED, FIXED, BASELINE, SCALAR, LARGER),
    "effort": (BASELINE,),
    "refine.minutes": (UNREFINED,),
    "refine.samples": (UNREFINED,),
    "evaluation.samples": (UNEVALUATED,),
    "evaluation.window": (UNEVALUATED,),
    "evaluation.stride": (UNEVALUATED,),
    "evaluation.batch_size": (UNEVALUATED,),
}

EXPLICIT = {"budget.neurons"}  # its default asks for something


def conflicts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for every field that is set and does not go with another."""
    yield from refused(without_effect(recipe, TABLE, EXPLICIT))
    budget = recipe.budget
    if recipe.form.moe is not None and budget.stored_limit != 1:
        yield f"budget.{budget.ratio_name}", "is 1 with form.moe, which drops nothing: leave out one of the two"
    if budget.top_k is not None and budget.n_primitives is not None and budget.top_k > budget.n_primitives:
        yield "budget.top_k", f"is more than the {budget.n_primitives} primitives of a bank: lower it to that at most"
    if budget.whole and budget.sharing != "none":
        yield "budget.share", "shares factors of matrices: leave out one of the two, this or whole matrices"
    if budget.whole and not budget.neurons:
        yield "budget.neurons", "leaves nothing to drop with whole matrices: leave out one of the two"
    if recipe.form.elastic and budget.uniform_width:
        yield "form.elastic", "cuts each layer to a width of its own: leave out one of form.elastic and uniform_width"
    yield from neuron_conflicts(recipe)
    if recipe.form.elastic and budget.sharing != "none":
        yield "form.elastic", "a shared bank has no order of its own for each layer: leave out one of the two"
    if recipe.form.elastic and not budget.neurons:
        yield "form.elastic", "needs neurons that may go: leave out one of form.elastic and budget.neurons false"
    if recipe.form.elastic and recipe.form.bank_dtype != "auto":
        yield "form.elastic", "integers are fitted to one size: leave out one of form.elastic and form.bank_dtype"
    if recipe.refine.steps and recipe.form.bank_dtype != "auto":
        yield "refine.steps", "quantised weights cannot be refined: leave out refine.steps, or form.bank_dtype"


def neuron_conflicts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for what does not go with banks of whole neurons."""
    budget = recipe.budget
    if budget.primitive != "neurons":
        return
    if budget.sharing == "auto":
        yield "budget.primitive", "whole neurons are shared where they are asked for by name: set budget.share always"
    if recipe.form.bank_dtype != "auto":
        yield "form.bank_dtype", "banks of neurons are not quantised in a conversion: leave out one of the two"
    if budget.mac_limit is not None and budget.mac_limit <= budget.stored_limit:
        field = "budget.mac_ratio" if budget.mac_ratio is not None else "budget.optimize"
        yield field, "leaves no MACs for sharing: with budget.primitive neurons they must be above the stored ratio"


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
