"""Llama: RMSNorm, RoPE, and a gated feed-forward block (SwiGLU; Touvron et al., 2023)."""

from typing import TYPE_CHECKING, Any

from pilon_compress.models.architectures.registry import base_architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@base_architecture("llama", about="RMSNorm, RoPE, gated feed-forward block (SwiGLU).", model="LlamaForCausalLM")
def config(**sizes: Any) -> "PretrainedConfig":
    """Return the config of a Llama with these sizes."""
    from transformers import LlamaConfig  # here: recipes are checked without transformers

    return LlamaConfig(**sizes)
