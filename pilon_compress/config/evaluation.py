"""An evaluation on its own: of which model, against which one."""

from typing import Annotated, ClassVar

from pydantic import Field

from pilon_compress.config.conversion import Evaluation
from pilon_compress.config.fields import Device
from pilon_compress.config.flat import Flat
from pilon_compress.config.option import RUNNING, Argument, Option
from pilon_compress.config.reading import Text
from pilon_compress.config.tiers import Tier


class EvaluateConfig(Flat, Evaluation):
    """Settings of an evaluation: text and windows."""

    SECTION: ClassVar[str] = "evaluation"

    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True), Option(panel=RUNNING)] = 0
    """Seed of the sample of texts that an encoder is evaluated on."""
    tier: Annotated[Tier | None, Option(panel=RUNNING, metavar="FIELD=VALUE")] = None
    """Tiers: hold this share of each bank's primitives in memory, as in n_hot=0.25; the others stay in the model's
    files until they are used (docs/tiers.md). Default: none."""
    device: Device = "auto"


class EvaluateCommand(EvaluateConfig):
    """Everything that decides an evaluation."""

    model: Annotated[Text, Argument()]
    """Model to evaluate: a PILON folder, or any dense model."""
    against: Annotated[Text | None, Option(metavar="MODEL")] = None
    """Dense model to compare with. Default: the one that the folder's recipe.yaml leads to."""
