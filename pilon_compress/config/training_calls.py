"""Trainings as Python programs ask for them: the fields of a recipe, most of them flat."""

from pydantic import model_validator

from pilon_compress.config.flat import Flat, arranged
from pilon_compress.config.model import ExpertsOf, FfnConfig, HostConfig, TernaryConfig
from pilon_compress.config.training import General, Progressive, TrainRecipe
from pilon_compress.config.training_sections import (
    Distill,
    ExitGates,
    Length,
    OptimizerConfig,
    Rate,
    Run,
    ScheduleConfig,
    Sequences,
)


class HealConfig(Flat, ExpertsOf, Distill, Run, Sequences, Length, Rate, Progressive, General):
    """The healing of a converted model as Python programs ask for it: the fields of a recipe, most of them flat.

    Fields that are not set have the defaults of healing. Raises BadInput for an unknown field, a value that is out of
    range, and fields that exclude each other.
    """

    ternary: TernaryConfig = TernaryConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    exits: ExitGates = ExitGates()

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
    exits: ExitGates = ExitGates()

    @model_validator(mode="after")
    def _every_option_counts(self) -> "TrainConfig":
        self.recipe(None if self.chat_template is None else "model")
        return self

    def recipe(self, start: str | None, tokenizer: str | None = None, **data: str | None) -> TrainRecipe:
        """Return the recipe that trains from scratch, or `start` on chats; `data`: text sources, as in the section."""
        given: dict[str, dict[str, str | None]] = {"data": data, "host": {"tokenizer": tokenizer}}
        fixed = {"task": "pretrain" if start is None else "sft", "start": start}
        return arranged(self, TrainRecipe, fixed, given)


class ExitGatesConfig(Flat, ExitGates, Sequences, General):
    """Exit gates for a model whose weights stay, as Python programs ask for them: the fields of a recipe, flat.

    Raises BadInput for an unknown field, a value that is out of range, and fields that exclude each other.
    """

    @model_validator(mode="after")
    def _every_option_counts(self) -> "ExitGatesConfig":
        self.recipe("model")
        return self

    def recipe(self, start: str, **data: str | None) -> TrainRecipe:
        """Return the recipe that adds gates to `start`; `data`: text sources, as fields of the section."""
        return arranged(self, TrainRecipe, {"task": "gates", "start": start}, {"data": data})
