"""A comparison of PILON with published baselines: what is compared, and on which text."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from pilon_compress.config.conversion import CalibrationConfig, Evaluation, Recipe
from pilon_compress.config.fields import MODEL, Device
from pilon_compress.config.flat import Flat
from pilon_compress.config.option import RUNNING, Argument, Option, Options
from pilon_compress.config.ratio import Parts, parse_list
from pilon_compress.config.reading import Positive, Text

WHAT, TEXT = "What is compared", "Calibration and evaluation"


class CompareConfig(Flat):
    """Settings of a comparison: methods, ratios, calibration and evaluation text."""

    ffn_ratio: Annotated[Parts, Field(min_length=1), Option(panel=WHAT, metavar="RATIO")] = [0.6, 0.4]
    """Largest ratios of stored FFN parameters over dense, with commas between them."""
    methods: Annotated[list[Text], BeforeValidator(parse_list), Option(panel=WHAT)] = []
    """Methods to compare, with commas between them; --list describes all of them. Default: every method that is
    compared at equal stored numbers."""
    seeds: Annotated[Positive, Option(panel=WHAT)] = 3
    """Calibration texts to draw, and to average over."""
    calibration: Annotated[CalibrationConfig, Options(TEXT)] = CalibrationConfig()
    evaluation: Annotated[Evaluation, Options(TEXT, prefix="eval-", only=("data", "samples"))] = Evaluation()
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True), Option(panel=RUNNING)] = 0
    """First seed: the texts are drawn with this one and those that follow."""
    device: Device = "auto"

    def recipe(self, model: str) -> Recipe:
        """Return the conversion of `model` that every method's own starts from."""
        return Recipe(model=model, seed=self.seed, calibration=self.calibration, evaluation=self.evaluation)


class CompareCommand(CompareConfig):
    """Everything that decides a comparison."""

    model: Annotated[Text, Field(description=f"Dense model to compress: {MODEL}"), Argument()]
