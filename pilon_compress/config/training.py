"""Recipes of a training. Their field `task` tells them from recipes of a conversion."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pilon_compress.config import reading, strict_yaml
from pilon_compress.config.conflicts import refuse_conflicts
from pilon_compress.config.fields import SOURCES, Device, DType
from pilon_compress.config.flat import Flat, arranged
from pilon_compress.config.model import FfnConfig, HostConfig, TernaryConfig
from pilon_compress.config.option import RUNNING, Option, Options
from pilon_compress.config.ratio import Parts
from pilon_compress.config.reading import Above, Count, Number, Override, Positive, Section, Share, Switch, Text
from pilon_compress.config.research import Research
from pilon_compress.config.strict_yaml import Document

Task = Literal["pretrain", "heal", "sft"]
WHAT = "What is trained"
HEAL = "Converted model that learns from its dense teacher; with --shrink a dense model. Default: no healing."
SFT = "Model, dense or PILON, to fine-tune on chats. Default: no fine-tuning."
WEIGHT_DECAY_ENDS = 0.5  # share of a ternary training, as in the second stage of BitNet b1.58 (Ma et al., 2024)


class TrainingText(Section):
    """The text to train on."""

    source: Annotated[Text | None, Option("--data", metavar="SOURCE", tail=SOURCES)] = None
    """Text to train on: a source such as hub:REPO:CONFIG:SPLIT:COLUMN, a file, or a glob; with task sft a file of
    chats, which must be named. Default: WikiText-2 for causal LMs, stdlib for encoders."""


class Sequences(Section):
    """Sequences of the text, and the text to validate on."""

    validation: Annotated[Text | None, Option(metavar="SOURCE")] = None
    """Text to validate on, named in the same way. Default: one document in five of `source`, chosen by a hash of its
    text, and not trained on."""
    sequence_length: Annotated[Positive, Option()] = 1024
    """Tokens per sequence."""
    respect_documents: Switch = False
    """Keep documents that share a sequence from attending to each other."""
    chat_template: Annotated[Text | None, Option(metavar="FILE")] = None
    """File with a Jinja chat template, for a tokenizer that has none (task sft). Default: the tokenizer's template."""
    streaming: Switch = False
    """Tokenise while training, for sources that are too large to store."""
    validation_sequences: Positive = 64
    """Sequences of the fixed slice of the validation text that is evaluated."""


class Data(Sequences, TrainingText):
    """The text to train on, and to validate on."""


class Rate(Section):
    """The learning rate."""

    learning_rate: Annotated[Above, Option()] = 1e-3
    """Highest learning rate of the schedule. Healing takes 1e-2 unless told otherwise, relative to each tensor's root
    mean square; encoders want less, 3e-3."""


class OptimizerConfig(Section):
    """The optimiser, and learning rates beside the main one."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimiser: adamw, or muon (orthogonalised momentum for matrices and primitives, AdamW for the rest)."""
    relative: Switch = False
    """Count learning rates of AdamW in shares of each tensor's root mean square. Healing does so by default."""
    muon_learning_rate: Above = 5e-3
    """Learning rate of muon, whose steps are as large as AdamW's at the same rate. Thin factors fail at 2e-2
    (docs/log.md)."""
    banks: Number = 1.0
    """Factor on the learning rate of banks."""
    compositions: Number = 1.0
    """Factor on the learning rate of compositions."""
    embeddings: Number = 1.0
    """Factor on the learning rate of embeddings."""
    weight_decay: Number = 0.1
    """Weight decay of matrices and banks."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    clip: Above | None = 1.0
    """Largest norm of the gradient; longer ones are scaled down."""


class Optimizer(OptimizerConfig, Rate):
    """Optimiser and learning rates."""


class Length(Section):
    """Length of the training."""

    tokens: Annotated[Positive | None, Option()] = None
    """Tokens to train on. Default: one pass over the text."""


class ScheduleConfig(Section):
    """Course of the learning rate."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    """Course of the learning rate: wsd (warm-up, stable, linear decay), cosine or constant."""
    warmup: Share = 0.02
    """Share of the training that the warm-up takes."""
    decay: Share = 0.3
    """Share of the training that the decay of wsd takes."""
    floor: Share = 0.0
    """Learning rate at the end, as a share of the highest."""


class Schedule(ScheduleConfig, Length):
    """Length of the training, and course of the learning rate."""


class Distill(Section):
    """Loss of a healing model against its teacher: weights of the terms, of which 0 leaves one out."""

    kl: Number = 1.0
    """Weight of KL(teacher ‖ student), the mean over tokens times the square of the temperature."""
    temperature: Annotated[Above, Option()] = 1.0
    """Distillation temperature."""
    next_token: Number = 0.0
    """Weight of the cross-entropy of the text itself."""
    hidden: Number | None = None
    """Weight of the squared error of every layer's states over the teacher's variance. Default: 0, or 1 for
    encoders."""
    pooled: Number = 1.0
    """Weight of 1 - cosine of the pooled embeddings (encoders)."""
    match_until: Share = 1.0
    """Share of the training after which the weight of `hidden` has fallen to 0."""
    cache_teacher: Annotated[Count, Option()] = 0
    """Cache this many of the teacher's largest log-probabilities per token on disk, so that it runs once; 0: no
    cache."""
    keep_best: Switch = True
    """End with the weights that were best on the validation text, not with the last ones."""


class Run(Section):
    """Batches, precision, processes, checkpoints and metrics."""

    batch_size: Annotated[Positive, Option()] = 32
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: Positive | None = None
    """Sequences per forward pass and process. Default: all of a process's share."""
    train: Annotated[Literal["all", "ffn", "compositions"], Option("--learn", panel=WHAT)] = "all"
    """Parameters that learn: all, those of the feed-forward blocks (ffn), or compositions alone."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """Precision of the computation: bfloat16 or none; auto takes bfloat16 on GPUs."""
    compile: Switch = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the backward pass, to save memory."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Data parallelism of several processes (torchrun): ddp, or fsdp, which shards the weights; auto takes ddp."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: Positive | None = None
    """Steps between evaluations. Default: twenty evaluations in all."""
    checkpoint_every: Above = 600
    """Shortest time between checkpoints, in seconds."""
    keep: Positive = 2
    """Checkpoints to keep."""
    sample: Text | None = None
    """Prompt that the model continues at every evaluation. Default: none."""
    spike: Above | None = 3.0
    """Abort if the loss exceeds its running mean by more than this (nats), or is not finite."""
    track: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Trackers that metrics go to besides metrics.jsonl."""


HEALING: dict[str, dict[str, Any]] = {
    "optimizer": {"relative": True, "learning_rate": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.99]},
    "schedule": {"kind": "cosine"},
}
"""Defaults of healing, where they differ (docs/results/training.md has what was tried)."""


class TaskModels(Section):
    """The task, and the models that it begins with."""

    task: Task
    """Task: pretrain (from scratch), heal (a converted model learns from its dense teacher) or sft (fine-tuning on
    chats)."""
    start: Annotated[
        Text | None,
        Option("--heal", WHAT, "MODEL", help=HEAL, also={"task": "heal"}),
        Option("--sft", WHAT, "MODEL", help=SFT, also={"task": "sft"}),
    ] = None
    """Model to heal or fine-tune, PILON or dense. Default: none, for task pretrain."""
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
    def warm(self) -> bool:
        """True if training begins with a dense model."""
        ffn = self.ffn
        return self.task == "pretrain" and ffn.kind == "pilon" and not ffn.matrices and ffn.dense_until > 0

    @model_validator(mode="after")
    def _every_option_counts(self) -> "TrainRecipe":
        refuse_conflicts(self, self._conflicts())
        return self

    def _conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield (dotted field, what is wrong) for every field that does not go with another."""
        if self.task != "pretrain" and self.start is None:
            yield "start", f"is needed with task {self.task}: name the model to begin with"
        if self.task == "pretrain" and self.start is not None:
            yield "start", "has no effect with task pretrain, which begins from scratch: leave out one of the two"
        if self.warm and (self.schedule.tokens is None or self.schedule.kind == "cosine"):
            yield "ffn.dense_until", "needs schedule.tokens, and a schedule.kind that is wsd or constant"
        if self.shrink and (self.task != "heal" or self.shrink != sorted(set(self.shrink), reverse=True)):
            yield "shrink", "is for task heal, and its ratios must fall"
        distill = self.distill
        if distill.cache_teacher and distill.hidden:
            yield "distill.cache_teacher", "keeps predictions only: leave it out, or distill.hidden at 0"
        if distill.cache_teacher and self.data.streaming:
            yield "distill.cache_teacher", "needs text that is stored: leave out one of the two, this or data.streaming"
        if self.task == "sft" and self.ternary.enabled:
            yield "ternary.enabled", "is for pretrain and heal: a ternary model is taught chats as it is"
        for name, section in self.research.sections.items():
            for field, message in section.conflicts(self):
                yield f"research.{name}.{field}", message


class HealConfig(Flat, Distill, Run, Sequences, Length, Rate, Progressive, General):
    """The healing of a converted model as Python programs ask for it: the fields of a recipe, most of them flat.

    Fields that are not set have the defaults of healing. Raises BadInput for an unknown field, a value that is out of
    range, and fields that exclude each other.
    """

    ternary: TernaryConfig = TernaryConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _every_option_counts(self) -> "HealConfig":
        self.recipe("model")
        return self

    def recipe(self, start: str, teacher: str | None = None, **data: str | None) -> TrainRecipe:
        """Return the recipe that heals `start`; `data`: text sources, as fields of the section."""
        return arranged(self, TrainRecipe, {"task": "heal", "start": start, "teacher": teacher}, {"data": data})


class TrainConfig(Flat, Run, Sequences, Length, Rate, General):
    """A training from scratch, or on chats, as Python programs ask for it: the fields of a recipe, most of them flat.

    Raises BadInput for an unknown field, a value that is out of range, and fields that exclude each other.
    """

    host: HostConfig = HostConfig()
    ffn: FfnConfig = FfnConfig()
    ternary: TernaryConfig = TernaryConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @model_validator(mode="after")
    def _every_option_counts(self) -> "TrainConfig":
        self.recipe(None)
        return self

    def recipe(self, start: str | None, tokenizer: str | None = None, **data: str | None) -> TrainRecipe:
        """Return the recipe that trains from scratch, or `start` on chats; `data`: text sources, as in the section."""
        given: dict[str, dict[str, str | None]] = {"data": data, "host": {"tokenizer": tokenizer}}
        fixed = {"task": "pretrain" if start is None else "sft", "start": start}
        return arranged(self, TrainRecipe, fixed, given)


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
