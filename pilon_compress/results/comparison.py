"""The result of a comparison: the contents of compare.json."""

from typing import Literal

from pilon_compress.results.base import Result
from pilon_compress.results.conversion import CalibrationText
from pilon_compress.results.evaluation import Evaluation
from pilon_compress.results.sizes import Sizes


class Spread(Result):
    """A figure over the calibration draws."""

    mean: float
    low: float
    high: float


class Figures(Result):
    """The figures of a method at one ratio; those of the other kind of model are None."""

    stored_ratio: Spread
    bytes_ratio: Spread
    mac_ratio: Spread
    model_stored_ratio: Spread
    """Stored ratio of the whole model; the ratios above are of its feed-forward part."""
    whitened_loss: Spread
    cosine: Spread | None = None
    neighbors10: Spread | None = None
    perplexity_ratio: Spread | None = None
    kl: Spread | None = None
    top1_agreement: Spread | None = None


class Row(Figures):
    """A method at one ratio, over all draws."""

    ratio: float
    method: str
    seeds: int


class Measured(Result):
    """Sizes and quality of one model."""

    ffn: Sizes
    model: Sizes
    whitened_loss: float
    quality: Evaluation


class DenseRow(Measured):
    """The dense model, judged like the others."""

    row: Figures


class Cell(Measured):
    """A method at one ratio on one calibration draw."""

    method: str
    ratio: float
    seed: int
    fit_seconds: float


class Comparison(Result):
    """PILON and baselines on the same model, text and budgets."""

    format_version: int
    pilon_compress: str
    """Version of this package."""
    source: str
    """The dense model."""
    command: str
    """The command line; empty for a call from Python."""
    output: str
    """The folder with compare.json and its pages; empty where none was asked for."""
    journal: str | None
    ratios: list[float]
    methods: list[str]
    seeds: list[int]
    calibration: CalibrationText
    kind: Literal["causal", "encoder"]
    evaluation: Evaluation
    """The circumstances of the evaluation, without figures."""
    dense: DenseRow
    rows: list[Row]
    """By ratio, largest first, and then best first."""
    cells: list[Cell]
    seconds: float


class PlannedCell(Result):
    """The size that a method reaches at a ratio."""

    method: str
    ratio: float
    stored: int
    stored_ratio: float
    bytes_ratio: float


class PlannedCalibration(Result):
    """The calibration text as it will be read."""

    data: str
    samples: int
    sequence_length: int
    batch_size: int


class PlannedComparison(Result):
    """The result of `compare --dry-run`."""

    dry_run: Literal[True]
    source: str
    seeds: list[int]
    cells: int
    calibration: PlannedCalibration
    planned: list[PlannedCell]
