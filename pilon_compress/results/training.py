"""The result of a training: the contents of train.json."""

from collections.abc import Sequence
from typing import Literal

from pilon_compress.results.base import Result
from pilon_compress.results.routing import Routing
from pilon_compress.results.sizes import Ratios, Replaced, Sizes

Task = Literal["pretrain", "heal", "sft", "gates"]


class Tiers(Result):
    """Tiers of a training: see `train.promotion`."""

    n_hot: float
    """Share of each bank's primitives that were hot."""
    hot: int
    """Hot primitives, of factors or whole neurons, over all banks."""
    cold: int
    """Cold ones."""


class PlannedTraining(Replaced):
    """The result of `train --dry-run`, from shapes alone."""

    dry_run: Literal[True]
    task: Task
    data: str
    tokens: int | None
    """None: one pass over the text."""
    batch_size: int
    parameters: int
    ffn: Sizes | Ratios
    model: Sizes | None = None
    tiers: Tiers | None = None
    """Where only a share of each bank's primitives will learn at a time."""


class Stage(Result):
    """A stage of a run that trains several times."""

    ratio: float | None = None
    before: float | None = None
    val_perplexity: float | None = None
    val_cosine: float | None = None
    steps: int | None = None
    tokens: int
    seconds: float


class TrainedExits(Result):
    """Exit gates at the end of a training, on its validation text."""

    skipped: float
    """Share of the feed-forward work that tokens skip."""
    skipped_by_layer: list[float]
    """Share of the tokens that skip each block, in layer order."""
    perplexity_without: float
    """The same model's perplexity where no token skips."""
    perplexity_increase: float
    """Perplexity over that, less 1."""
    max_perplexity_increase: float
    """The most that was allowed."""
    threshold: float
    """Log of the predicted price, KL in nats for work of a mean block, below which tokens skip."""
    substitute: int
    """Rank of the linear map that answers in a skipped block's place."""
    tokens: int
    """Tokens that prices were estimated on."""
    seconds: float


class TrainedTiers(Tiers):
    """Tiers at the end of a training."""

    promoted: int
    """Times that a cold one took the place of a hot one, since the run began or was resumed."""


class TrainResult(Replaced):
    """Figures of a finished training, on its validation text."""

    format_version: int
    pilon_compress: str
    """Version of this package."""
    task: Task
    data: str
    val_perplexity: float | None = None
    """Causal language models."""
    best_val_perplexity: float | None = None
    val_cosine: float | None = None
    """Encoders: mean cosine of a text's embedding to the teacher's."""
    best_val_cosine: float | None = None
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    parameters: int
    ffn: Sizes | Ratios
    """The feed-forward projections; ratios alone for a dense model."""
    model: Sizes | None = None
    """The whole model, where it is a PILON model."""
    routing: Routing | None = None
    """Figures of experts and routers; None of a model without."""
    processes: int
    device: str
    command: str
    """The command line; empty for a call from Python."""
    recipe: str
    """YAML that `train --recipe` takes."""
    output: str
    """The folder that was written."""
    begins_with: str | None = None
    """Tokens before every sequence; None for none."""
    before: float | None = None
    """Healing: perplexity, or cosine, before it."""
    teacher_model: str | None = None
    teacher: float | None = None
    """The teacher's perplexity; 1 for encoders."""
    perplexity_ratio: float | None = None
    """Perplexity over the teacher's."""
    neighbors10: float | None = None
    """Encoders: share of a text's 10 nearest texts that it has with the teacher."""
    exits: TrainedExits | None = None
    """Where the training ended with exit gates; `val_perplexity` is then the one with skipping."""
    tiers: TrainedTiers | None = None
    """Where only a share of each bank's primitives learned at a time."""
    stages: list[Stage] | None = None
    """Where there were several trainings in turn; steps, tokens and seconds are then their sums."""

    def stage(self, told: Sequence[str], ratio: float | None = None) -> Stage:
        """This training as one of several, with those of the fields `told` that it has."""
        found = {} if ratio is None else {"ratio": ratio}
        return Stage.model_validate(found | {name: value for name, value in self.dump().items() if name in told})
