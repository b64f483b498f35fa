"""Arcee (AFM): RMSNorm, RoPE, and an ungated feed-forward block of squared ReLU (So et al., 2021)."""

from typing import TYPE_CHECKING, Any

from pilon_compress.models.architectures.registry import base_architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@base_architecture("arcee", about="RMSNorm, RoPE, ungated feed-forward block (squared ReLU).", model="ArceeForCausalLM")
def config(**sizes: Any) -> "PretrainedConfig":
    """Return the config of an Arcee model with these sizes."""
    from transformers import ArceeConfig  # here: recipes are checked without transformers

    return ArceeConfig(**sizes)
