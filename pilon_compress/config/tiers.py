"""Tiers: the share of each bank's primitives that is held in memory, and in training when it changes."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pilon_compress.config.pairs import fields_of
from pilon_compress.config.ratio import Ratio
from pilon_compress.config.reading import Number, Positive, Section


class RunningTier(Section):
    """Tiers of a model that runs."""

    n_hot: Annotated[Ratio, Field(gt=0, lt=1)]
    """Share of each bank's primitives that is held in memory: those that the layers use most. The others stay in the
    file."""


class TrainingTier(RunningTier):
    """Tiers of a model that trains: hot primitives have gradients and optimiser states, the others rest in files."""

    every: Positive = 20
    """Steps between promotions of cold primitives."""
    margin: Number = 0.2
    """Share by which the use of a cold primitive must exceed that of the hot one whose place it takes."""


def n_hot_of(tier: RunningTier | None) -> float | None:
    """Return the share of hot primitives; None where there are no tiers."""
    return None if tier is None else tier.n_hot


def _read(value: Any) -> Any:
    """Return the fields of "n_hot=0.25,every=10"; a share alone is that of hot primitives."""
    alone = isinstance(value, int | float) and not isinstance(value, bool)
    return {"n_hot": value} if alone else fields_of(value, "--tier", "n_hot=0.25")


Tier = Annotated[RunningTier, BeforeValidator(_read)]
TierOfTraining = Annotated[TrainingTier, BeforeValidator(_read)]
