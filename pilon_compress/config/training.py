"""Recipes of a training. Their field `task` tells them from recipes of a conversion."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pilon_compress.config import reading, strict_yaml
from pilon_compress.config.conflicts import Context, Table, refuse_conflicts, refused, without_effect
from pilon_compress.config.experts import ExpertsConfig, expert_conflicts
from pilon_compress.config.fields import Device, DType
from pilon_compress.config.model import FfnConfig, HostConfig, TernaryConfig, ffn_conflicts
from pilon_compress.config.option import RUNNING, Option, Options
from pilon_compress.config.ratio import Parts
from pilon_compress.config.reading import Override, Section, Text
from pilon_compress.config.research import Research
from pilon_compress.config.strict_yaml import Document
from pilon_compress.config.training_sections import (
    WHAT,
    Data,
    Distill,
    ExitGates,
    Optimizer,
    Run,
    Schedule,
)

Task = Literal["pretrain", "heal", "sft", "gates"]
HEAL = "Converted model that learns from its dense teacher; with --shrink a dense model. Default: no healing."
SFT = "Model, dense or PILON, to fine-tune on chats. Default: no fine-tuning."
GATES = (
    "End with exit gates, which let tokens skip feed-forward blocks. With MODEL, dense or PILON, its weights stay and "
    "gates are all that is trained. Default: no gates."
)
WEIGHT_DECAY_ENDS = 0.5  # share of a ternary training, as in the second stage of BitNet b1.58 (Ma et al., 2024)


HEALING: dict[str, dict[str, Any]] = {
    "optimizer": {"relative": True, "learning_rate": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.99]},
    "schedule": {"kind": "cosine"},
}
"""Defaults of healing, where they differ (docs/results/training.md has what was tried)."""


class TaskModels(Section):
    """The task, and the models that it begins with."""

    task: Task
    """Task: pretrain (from scratch), heal (a converted model learns from its dense teacher), sft (fine-tuning on chats)
    or gates (exit gates for a model whose weights stay)."""
    start: Annotated[
        Text | None,
        Option("--heal", WHAT, "MODEL", help=HEAL, also={"task": "heal"}),
        Option("--sft", WHAT, "MODEL", help=SFT, also={"task": "sft"}),
        Option("--exit-gates", WHAT, "[MODEL]", help=GATES, also={"task": "gates"}, bare="exits.enabled"),
    ] = None
    """Model to heal, to fine-tune or to add exit gates to, PILON or dense. Default: none, for task pretrain."""
    teacher: Annotated[Text | None, Option(panel=WHAT, metavar="MODEL")] = None
    """Dense model that the healing model learns from. Default: the one that it was converted from."""


class Progressive(Section):
    """Conversion and healing in turn."""

    shrink: Annotated[Parts, Option(panel=WHAT, metavar="RATIO")] = []
    """Ratios of stored FFN parameters, in falling order with commas between them: the dense model to heal is converted
    to the first and healed, the result converted to the next, and so on, with equal shares of the tokens. Default:
    none."""


class General(Section):
    """Fields of a training that belong to no section."""

    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True), Option(panel=RUNNING)] = 0
    """Seed of initial weights, and of the order of the text."""
    dtype: DType = "auto"
    """Number type of the saved weights; auto keeps that of `start`, or takes float32. Ternary models are saved in
    float32, since rounding would move their weights; `export` can narrow the rest."""
    device: Device = "auto"


class TrainRecipe(General, Progressive, TaskModels):
    """Everything that decides a training run."""

    MOVED: ClassVar[dict[str, str]] = {
        "staged": "research.original.staged",
        "selection": "research.original.selection",
        "ffn.matrices": "ffn.primitive",
        "ffn.latent_scale": "research.original.latent_scale",
        "ffn.latent_bias": "research.original.latent_bias",
        "ternary.sub_norm": "research.bitnet.sub_norm",
        "ternary.warmup": "research.bitnet.warmup",
        "ternary.second": "research.bitnet.second",
        "ternary.second_rate": "research.bitnet.second_rate",
    }

    host: HostConfig = HostConfig()
    ffn: Annotated[FfnConfig, Options(WHAT)] = FfnConfig()
    ternary: Annotated[TernaryConfig, Options(WHAT)] = TernaryConfig()
    data: Annotated[Data, Options("Text")] = Data()
    optimizer: Annotated[Optimizer, Options(RUNNING)] = Optimizer()
    schedule: Annotated[Schedule, Options(RUNNING)] = Schedule()
    distill: Annotated[Distill, Options(WHAT)] = Distill()
    exits: Annotated[ExitGates, Options(WHAT)] = ExitGates()
    run: Annotated[Run, Options(RUNNING)] = Run()
    research: Research = Research()
    """Research modules by name, with their own fields: `original` (the original PILON's training), `bitnet`."""

    @model_validator(mode="before")
    @classmethod
    def _healing(cls, data: Any) -> Any:
        """Fill in the defaults of healing; recipes hold them like anything else that is not a default."""
        if not isinstance(data, dict) or data.get("task") != "heal":
            return data
        filled = dict(data)
        for section, defaults in HEALING.items():
            given = filled.get(section, {})
            if isinstance(given, dict):
                filled[section] = {**defaults, **given}
        return filled

    @property
    def weight_decay_ends(self) -> float:
        """Share of the steps after which weight decay is off: 1 unless the training is ternary."""
        ends = [section.weight_decay_ends for section in self.research.sections.values()]
        return next((end for end in ends if end is not None), WEIGHT_DECAY_ENDS) if self.ternary.enabled else 1.0

    @property
    def gated(self) -> bool:
        """True if the training ends with exit gates."""
        return self.task == "gates" or self.exits.enabled

    @property
    def warm(self) -> bool:
        """True if training begins with a dense model."""
        ffn = self.ffn
        composed = ffn.kind == "pilon" and ffn.primitive == "factors" and ffn.like is None
        return self.task == "pretrain" and composed and ffn.dense_until > 0

    @model_validator(mode="after")
    def _every_option_counts(self) -> "TrainRecipe":
        refuse_conflicts(self, conflicts(self))
        return self


SCRATCH = Context[TrainRecipe](lambda r: r.task == "pretrain", lambda _: "task pretrain, which begins from scratch")
STARTED = Context[TrainRecipe](lambda r: r.task != "pretrain", lambda r: f"task {r.task}, whose model is there already")
TAUGHT = Context[TrainRecipe](lambda r: r.task == "sft", lambda _: "task sft, whose model is there already")
ALONE = Context[TrainRecipe](lambda r: r.task != "heal", lambda r: f"task {r.task}, which distils nothing")
LIKE = Context[TrainRecipe](lambda r: r.ffn.like is not None, lambda _: "ffn.like, which brings the model's shape")
FLOAT = Context[TrainRecipe](lambda r: not r.ternary.enabled, lambda _: "ternary.enabled false")
UNHEALED = Context[TrainRecipe](
    lambda r: r.task != "heal" and not r.warm, lambda r: f"task {r.task}, which heals nothing"
)
COLD = Context[TrainRecipe](lambda r: r.ffn.dense_until == 0, lambda _: "ffn.dense_until 0")
ADAMW = Context[TrainRecipe](lambda r: r.optimizer.name == "adamw", lambda _: "optimizer.name adamw")
CONSTANT = Context[TrainRecipe](lambda r: r.schedule.kind == "constant", lambda _: "schedule.kind constant")
COSINE = Context[TrainRecipe](lambda r: r.schedule.kind == "cosine", lambda _: "schedule.kind cosine")
NO_KL = Context[TrainRecipe](lambda r: r.distill.kl == 0, lambda _: "distill.kl 0")
NO_HIDDEN = Context[TrainRecipe](lambda r: r.distill.hidden == 0, lambda _: "distill.hidden 0")

FROZEN = Context[TrainRecipe](lambda r: r.task == "gates", lambda _: "task gates, which changes no weights")
UNGATED = Context[TrainRecipe](lambda r: not r.gated, lambda _: "exits.enabled false")

TABLE: dict[str, tuple[Context[TrainRecipe], ...]] = {
    "start": (SCRATCH,),
    "teacher": (ALONE,),
    **{f"distill.{name}": (ALONE,) for name in Distill.model_fields},
    "distill.temperature": (ALONE, NO_KL),
    "distill.cache_teacher": (ALONE, NO_KL),
    "distill.match_until": (ALONE, NO_HIDDEN),
    **{f"host.{name}": (STARTED,) for name in HostConfig.model_fields},
    **{f"ffn.{name}": (STARTED,) for name in FfnConfig.model_fields},
    "ffn.moe": (TAUGHT,),
    "ffn.dense_after": (STARTED, COLD),
    "ternary.group": (FLOAT,),
    **{f"ternary.{name}": (FLOAT, UNHEALED) for name in ("after", "blocks", "scales")},
    "data.chat_template": (SCRATCH,),
    "optimizer.muon_learning_rate": (ADAMW,),
    "schedule.decay": (CONSTANT, COSINE),
    "schedule.floor": (CONSTANT,),
    **{f"exits.{name}": (UNGATED,) for name in ExitGates.model_fields if name != "enabled"},
}
_SECTIONS: dict[str, type[Section]] = {"optimizer": Optimizer, "schedule": Schedule, "run": Run}
_OF_WEIGHTS = [f"{section}.{name}" for section, fields in _SECTIONS.items() for name in fields.model_fields]
_OF_WEIGHTS += ["ternary.enabled", "data.chat_template"]
TABLE |= {path: (*TABLE.get(path, ()), FROZEN) for path in _OF_WEIGHTS}

DENSE = Context[TrainRecipe](lambda r: r.ffn.kind == "dense", lambda _: "ffn.kind dense")
PRIVATE = Context[TrainRecipe](lambda r: r.ffn.kind == "lowrank", lambda _: "ffn.kind lowrank")
NEURONS = Context[TrainRecipe](lambda r: r.ffn.primitive == "neurons", lambda _: "ffn.primitive neurons")
FACTORS = Context[TrainRecipe](lambda r: r.ffn.primitive == "factors", lambda _: "ffn.primitive factors")
UNSHARED = Context[TrainRecipe](lambda r: r.ffn.share == "none", lambda _: "ffn.share none")
WARM = Context[TrainRecipe](lambda r: r.warm, lambda _: "ffn.dense_until: the conversion decides")

FORM: Table[TrainRecipe] = {
    **{f"host.{name}": (LIKE,) for name in HostConfig.model_fields},
    "ffn.kind": (LIKE,),
    "ffn.moe": (LIKE, DENSE, PRIVATE),
    "ffn.ffn_ratio": (LIKE, DENSE),
    "ffn.mac_ratio": (LIKE, DENSE),
    "ffn.primitive": (LIKE, DENSE, PRIVATE),
    "ffn.share": (LIKE, DENSE, PRIVATE, WARM),
    "ffn.scales": (LIKE, DENSE, PRIVATE, FACTORS, UNSHARED),
    "ffn.dense_until": (LIKE, DENSE, NEURONS, PRIVATE),
    "ffn.dense_after": (LIKE, DENSE, NEURONS, PRIVATE),
    "ffn.neurons": (LIKE, DENSE, NEURONS, WARM),
    "ffn.bands": (LIKE, DENSE, PRIVATE, UNSHARED, WARM),
    "ffn.top_k": (LIKE, DENSE, NEURONS, PRIVATE, UNSHARED, WARM),
    **{f"ffn.{name}": (LIKE, DENSE, NEURONS, PRIVATE, WARM) for name in ("rank", "n_primitives", "composition")},
}
"""Fields that a control run of the same recipe has no use for: not refused, see `idle`."""


def conflicts(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for every field that is set and does not go with another."""
    if recipe.task != "pretrain" and recipe.start is None:
        yield "start", f"is needed with task {recipe.task}: name the model to begin with"
    if recipe.warm and (recipe.schedule.tokens is None or recipe.schedule.kind == "cosine"):
        yield "ffn.dense_until", "needs schedule.tokens, and a schedule.kind that is wsd or constant"
    if recipe.task == "pretrain" and recipe.ffn.like is None:
        yield from ffn_conflicts(recipe.ffn)
    if recipe.ffn.moe is not None:
        yield from moe_conflicts(recipe, recipe.ffn.moe)
    if recipe.run.tier is not None:
        yield from tier_conflicts(recipe)
    if recipe.shrink and (recipe.task != "heal" or recipe.shrink != sorted(set(recipe.shrink), reverse=True)):
        yield "shrink", "is for task heal, and its ratios must fall"
    distill = recipe.distill
    if distill.cache_teacher and distill.hidden:
        yield "distill.cache_teacher", "keeps predictions only: leave it out, or distill.hidden at 0"
    if distill.cache_teacher and recipe.data.streaming:
        yield "distill.cache_teacher", "needs text that is stored: leave out one of the two, this or data.streaming"
    ffn = recipe.ffn
    if ffn.top_k is not None and ffn.n_primitives is not None and ffn.top_k > ffn.n_primitives:
        yield "ffn.top_k", f"is more than the {ffn.n_primitives} primitives of a bank: lower it to that at most"
    if recipe.shrink and recipe.exits.enabled:
        yield "exits.enabled", "is for a training that ends once, not with shrink: add gates to its result, task gates"
    if recipe.task == "sft" and recipe.ternary.enabled:
        yield "ternary.enabled", "is for pretrain and heal: a ternary model is taught chats as it is"
    if recipe.ternary.after + recipe.ternary.blocks + recipe.ternary.scales > 1 + 1e-9:
        yield "ternary.after", "is more than all of the tokens, with ternary.blocks and ternary.scales: lower one"
    if recipe.ternary.blocks and recipe.data.streaming:
        yield "ternary.blocks", "needs text that is stored: leave out one of the two, this or data.streaming"
    for name, section in recipe.research.sections.items():
        for field, message in section.conflicts(recipe):
            yield f"research.{name}.{field}", message
    yield from refused(without_effect(recipe, TABLE))


def moe_conflicts(recipe: TrainRecipe, moe: ExpertsConfig) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for what does not go with experts."""
    yield from expert_conflicts(moe)
    if recipe.research.sections:
        yield "ffn.moe", "does not go with fields of research: leave out one of the two"
    if recipe.shrink:
        yield "ffn.moe", "heals one model, and shrink converts several: leave out one of the two"
    if recipe.task == "heal" and recipe.ternary.enabled:
        yield "ffn.moe", "is ternary from scratch alone: leave out one of the two, this or ternary.enabled"
    if recipe.task == "heal" and moe.shared:
        yield (
            "ffn.moe",
            "of a converted model has no shared experts, which would count its blocks twice: leave them out",
        )


def tier_conflicts(recipe: TrainRecipe) -> Iterator[tuple[str, str]]:
    """Yield (dotted field, what is wrong) for what does not go with tiers, which are for banks of floats."""
    ours, fresh = "run.tier", recipe.task == "pretrain" and recipe.ffn.like is None
    if fresh and recipe.ffn.kind != "pilon":
        yield ours, f"is for banks, which ffn.kind {recipe.ffn.kind} has not: leave out one of the two"
    if fresh and recipe.ffn.kind == "pilon" and recipe.ffn.composition == "softmax":
        yield ours, "needs ffn.composition component or scalar"
    if fresh and recipe.ffn.primitive == "neurons" and not recipe.ffn.scales:
        yield ours, "goes by the scales of neurons: leave out one of the two, this or ffn.scales false"
    if recipe.warm or recipe.shrink:
        other = "ffn.dense_until" if recipe.warm else "shrink"
        yield ours, f"is for one model whose banks are there already: leave out one of the two, this or {other}"
    if recipe.ternary.enabled:
        yield ours, "is for floats: leave out one of the two, this or ternary.enabled"
    if recipe.task == "heal" and recipe.distill.keep_best:
        yield ours, "keeps the last weights, not the best ones: set distill.keep_best to false"
    if recipe.run.compile:
        yield ours, "reads files as it computes: leave out one of the two, this or run.compile"
    if recipe.run.train == "compositions":
        yield ours, "is for banks that learn: leave out one of the two, this or run.train compositions"
    if recipe.research.sections:
        yield ours, "does not go with fields of research: leave out one of the two"


def idle(recipe: TrainRecipe) -> list[str]:
    """Return sentences about the fields that are set and that the form of the model has no use for."""
    found: dict[str, list[str]] = {}
    for field, message in without_effect(recipe, FORM):
        found.setdefault(message, []).append(field)
    return [f"{', '.join(fields)}: {message}" for message, fields in found.items()]


def load(name_or_path: str, overrides: Sequence[str | Override] = ()) -> TrainRecipe:
    """Read the bundled recipe of that name, else the YAML file at that path, and apply `overrides`, each "a.b=value".

    Raises BadInput as `pilon_compress.config.conversion.load` does.
    """
    return reading.load(TrainRecipe, name_or_path, overrides, "convert")


def build(
    data: Mapping[str, Any], overrides: Sequence[str | Override] = (), origin: str = "command line"
) -> TrainRecipe:
    """Return the recipe of nested dictionaries and `overrides`. `origin` begins the messages of BadInput."""
    return reading.checked(TrainRecipe, Document(origin, data), overrides)


def dump(recipe: TrainRecipe) -> str:
    """Return YAML that `load` reads as an equal recipe: what differs from the defaults, and all that a task presets."""
    shown = {"task": recipe.task, "seed": recipe.seed} | json.loads(recipe.model_dump_json(exclude_defaults=True))
    if recipe.task == "heal":  # a value that is the default of other tasks must not be read as healing's
        every = recipe.model_dump(mode="json")
        for section, presets in HEALING.items():
            shown[section] = shown.get(section, {}) | {field: every[section][field] for field in presets}
    return strict_yaml.dump({field: shown[field] for field in TrainRecipe.model_fields if field in shown})


def schema() -> dict[str, Any]:
    """Return the JSON schema of a training recipe, for editors: the contents of recipes/train.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TrainRecipe.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
