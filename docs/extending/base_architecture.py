"""A base architecture of your own: a Llama whose feed-forward block is ungated, and names its matrices in its own way.

    PILON_PLUGINS=base_architecture.py pilon-compress train --recipe smoke --set host.family=relu-llama -o out/relu
    PILON_PLUGINS=base_architecture.py pilon-compress convert MODEL --ffn-ratio 0.5 -o out/half

This file is all: the class with its config, and one registration.
"""

from typing import Any

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pilon_compress.models.architectures.registry import base_architecture


class ReluLlamaConfig(LlamaConfig):
    model_type = "relu_llama"


class ReluBlock(nn.Module):
    """`x` (..., hidden) -> (..., hidden): widen, ReLU, narrow."""

    def __init__(self, config: ReluLlamaConfig) -> None:
        super().__init__()
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.widen(x).relu())


class ReluLlamaForCausalLM(LlamaForCausalLM):
    config_class = ReluLlamaConfig

    def __init__(self, config: ReluLlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ReluBlock(config)
        self.post_init()


@base_architecture(
    "relu-llama",
    about="RMSNorm, RoPE, ungated feed-forward block (ReLU).",
    model=ReluLlamaForCausalLM,
    projections={"up": "mlp.widen", "down": "mlp.narrow"},
)
def config(**sizes: Any) -> ReluLlamaConfig:
    """Return the config of a model with these sizes, which are named as in LlamaConfig."""
    return ReluLlamaConfig(**sizes)
