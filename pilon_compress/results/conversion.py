"""The report of a conversion: the contents of report.json."""

from typing import Literal

from pilon_compress.results.base import Result
from pilon_compress.results.evaluation import Evaluation
from pilon_compress.results.sizes import Part, Replaced, Share, Sizes


class PlannedPart(Part):
    """A bank or a dense matrix of a plan."""

    band: int


class Plan(Result):
    """Banks and dense matrices of a conversion; none are listed before the plan is final."""

    ratio: float
    """Largest ratio of stored numbers of everything that is replaced."""
    ffn_ratio: float | None
    """The same where feed-forward projections alone are replaced; else None."""
    bands: list[list[int]]
    """Layers of each band."""
    banks: list[PlannedPart]


class Estimate(Result):
    """Cost of a conversion on this machine, estimated before it begins."""

    seconds: float
    peak_gib: float


class ConversionPlan(Replaced):
    """Sizes of a conversion, known before any weight is solved for."""

    plan: Plan
    dtype: str
    """Number format of the saved weights."""
    source_dtype: str
    """Number format of the dense model's file."""
    ffn: Sizes
    """The feed-forward projections that are replaced; where none is, 0 of 0 numbers and ratios of 1."""
    model: Sizes
    """The whole model."""
    untouched: list[Share]
    """Experts and routers that stay as they are."""
    notes: list[str]
    """Sentences about `untouched` and the sizes."""


class DryRun(ConversionPlan):
    """The result of `convert --dry-run`."""

    dry_run: Literal[True]
    final: bool
    """False where sizes are about: the layers are sized by calibration, which needs weights."""
    estimate: Estimate


class Spectrum(Result):
    """Output power of the components of a whitened weight, largest first, at some of their ranks."""

    index: list[int]
    """Ranks, from 1 on."""
    energy: list[float]
    """Share of the power."""


class Projection(Result):
    """A projection that was replaced, with its errors."""

    name: str
    layer: int
    role: str
    band: int
    relative_error: dict[str, float]
    """By method: norm of the output error over the norm of the outputs, on the calibration text."""
    spectrum: Spectrum
    cut: int
    """Rank at which the low-rank baselines cut it, at the ratio of the plan."""


class BankUsage(Result):
    """Bank diagnostics: the use of a bank by the layers of its band."""

    band: int
    role: str
    layers: list[int]
    energy: list[list[float]]
    """By layer: share of the power that each primitive has."""
    entropy: list[float]
    """By layer: 0, one primitive does all, to 1, all alike."""
    gini: list[float]
    """By layer: 0, all alike, to nearly 1."""
    selected_share: list[float]
    """By primitive: share of the layers that select it."""
    utilisation: float
    """Share of the primitives that any layer selects."""


class CalibrationText(Result):
    """The text that a conversion was calibrated on."""

    data: str
    texts: int
    """Sequences."""
    tokens: int
    begins_with: str | None = None
    """Tokens before every sequence; None for none."""


class Refinement(Result):
    """Distillation right after the conversion."""

    steps: int
    seconds: float
    rate: float
    """Learning rate, relative to each tensor's root mean square, after the halvings."""
    halvings: int
    """Times that the loss ran away and the rate was halved."""
    before: float
    """Held-out loss, as `after`: mean 1 - cosine of the embeddings, or mean KL(dense ‖ converted) in nats."""
    after: float
    kept: bool
    """False where it did not lower the loss: the model is then what it was before."""
    history: list[tuple[int, float]]
    """(step, held-out loss)."""


class SlicedBlock(Result):
    """A feed-forward block in slices of its neurons, measured on the calibration text."""

    name: str
    layer: int
    load: list[float]
    """Share of the choices that each expert gets."""
    relative_error: float
    """Squared error of the block's output over the output's squares, its input being the dense model's."""


class SharingTrial(Result):
    """A band that was tried with shared banks, and the model's loss on text that no fit has seen."""

    layers: list[int]
    private: float | None
    """Loss with factors and matrices of the layers' own that store as many numbers; None where none are as small."""
    shared: float
    accepted: bool


class SharingTrials(Result):
    """The trials of `share: auto`: KL divergence times two per token, or squared distance of embeddings."""

    bands: list[SharingTrial]
    loss: float | None
    """Loss of the model as it was chosen; None where no band was accepted."""
    alone: float | None
    """Loss of the model without any sharing."""


class Report(ConversionPlan):
    """The report of a conversion."""

    format_version: int
    pilon_compress: str
    """Version of this package."""
    source: str
    """The dense model."""
    method: str
    whitened_loss: dict[str, float]
    """By method, at equal stored size: mean over the projections of their relative squared output error."""
    projections: list[Projection]
    banks: list[BankUsage]
    kept: list[Share]
    """Parameters that the conversion leaves alone, by place."""
    sharing: SharingTrials | None = None
    """Trials of `share: auto`; None for any other setting."""
    slices: list[SlicedBlock] | None = None
    """Blocks of a conversion to experts (`form.moe`); None for any other."""
    calibration: CalibrationText
    refinement: Refinement | None
    command: str
    """The command line that made it; empty for a call from Python."""
    output: str
    """The folder that the model is in; empty until it is saved."""
    recipe: str
    """YAML that `convert --recipe` takes."""
    estimate: Estimate
    evaluation: Evaluation | None
    evaluation_skipped: str | None = None
    """Why there is no evaluation."""
    seconds: float
    peak_rss_gib: float
    """Largest resident memory of the process until then."""
