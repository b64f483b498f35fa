"""The quality of a model on a text."""

from typing import Literal

from pilon_compress.results.base import Result


class Evaluation(Result):
    """Figures that judge a model. Causal language models have other ones than encoders; the rest is None."""

    kind: Literal["causal", "encoder"]
    perplexity: float | None = None
    """Exponential of the mean loss per token (causal)."""
    bits_per_byte: float | None = None
    """Loss in bits over bytes of text (causal)."""
    tokens: int | None = None
    """Tokens that were scored (causal)."""
    bytes: int | None = None
    """UTF-8 bytes of text that these tokens stand for (causal)."""
    window: int | None = None
    """Tokens of one input (causal)."""
    stride: int | None = None
    """Tokens by which windows advance (causal)."""
    begins_with: str | None = None
    """Tokens before every window; None for none (causal)."""
    eos: bool | None = None
    """True if EOS stands between documents (causal)."""
    dense_perplexity: float | None = None
    """The dense model's, as all below but the last three (causal)."""
    dense_bits_per_byte: float | None = None
    perplexity_ratio: float | None = None
    """Perplexity over the dense model's; 1 is lossless (causal)."""
    kl: float | None = None
    """Mean KL(dense ‖ model), in nats per token; 0 is lossless (causal)."""
    top1_agreement: float | None = None
    """Share of tokens for which both models rank the same token first (causal)."""
    skipped: float | None = None
    """Share of the feed-forward work that exit gates skipped (causal models with gates)."""
    skipped_by_layer: list[float] | None = None
    """Share of the tokens that skipped each block with a gate, in layer order."""
    cosine: float | None = None
    """Mean cosine of a text's embeddings by both models; 1 is lossless (encoder)."""
    neighbors10: float | None = None
    """Share of a text's 10 nearest texts that both models agree on (encoder)."""
    texts: int | None = None
    """Texts that were embedded (encoder)."""
    model: str | None = None
    """Reference of the model that was evaluated."""
    against: str | None = None
    """The dense model that it was compared with."""
    data: str | None = None
    """Source of the text."""
