"""Results of a benchmark of a model or a feed-forward block."""

from pilon_compress.results.against import Against
from pilon_compress.results.base import Result


class Timing(Result):
    """Times of one variant."""

    seconds: float
    """Median of the rounds."""
    least_seconds: float
    speedup: float
    """Over dense fp32: median of the rounds."""
    spread: list[float]
    """10th and 90th percentile of the rounds' speedups."""
    bytes: int | None = None
    """Blocks: of the weights that are read."""
    bandwidth_share: float | None = None
    """Blocks: bytes per second, at best, over what the memory gives."""


class BlockShape(Result):
    """Shape of a feed-forward block."""

    d: int
    hidden: int
    active: int
    """Components of rank that are computed."""
    rank: int
    gated: bool
    activation: str
    batch: int
    top_k: int


class Benchmark(Result):
    """Times of all variants, taken in turns in one process. A model has `prefill` and `decode`, a block `variants`."""

    model: str | None = None
    context: int | None = None
    """Tokens that a model reads before it decodes one."""
    batch: int | None = None
    """Sequences at once."""
    ffn: BlockShape | None = None
    device: str
    hardware: str
    kernel: str
    """The ternary kernel in use."""
    kernels: dict[str, str] | None = None
    """Models: by projection, the kernel that computes it in the model as loaded. Blocks: that of `pilon_ternary`."""
    threads: int
    rounds: int
    torch: str
    memory_bytes_per_second: float | None = None
    prefill: dict[str, Timing] | None = None
    """By variant: reading `context` tokens."""
    decode: dict[str, Timing] | None = None
    """By variant: one token after `context` tokens (causal language models)."""
    skipped_work: float | None = None
    """Models with exit gates: share of the feed-forward work that is skipped on the text that is read."""
    speedup: dict[str, float] | None = None
    """Blocks: by variant, over dense fp32."""
    spread: dict[str, list[float]] | None = None
    variants: dict[str, Timing] | None = None
    against: Against | None = None
    """Models that were timed against another runtime, in place of variants."""
    skipped: dict[str, str]
    """Variants, or figures, that cannot be had here, and why."""
