"""Describe a transformers model as an architecture of llama.cpp: its name, hyperparameters, and turned weights.

A hyperparameter is a key of the file (docs/gguf.md of ggml); names of tensors come from gguf's own map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "bert": "bert"}
"""llama.cpp's architecture by `config.model_type`; `deci` is that of Llamas with a width for every layer."""
ROTATED = ("llama", "deci")
"""Architectures that rotate neighbouring numbers of a head, where transformers rotates its halves."""
ROTATIONS = ("default", "llama3")
LEARNED = ("gpt2", "bert")
"""Kinds of models whose positions are learned vectors."""
ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh"), "bert": ("gelu",)}


def refuse(config: PretrainedConfig) -> str | None:
    """Say, as the end of a sentence, why llama.cpp cannot run a model of this config; None if it can."""
    kind = config.model_type
    if kind not in NAMES:
        return f"is of the type {kind}: GGUF files are written of {', '.join(NAMES)}"
    if kind not in LEARNED and rotation(config).get("rope_type", "default") not in ROTATIONS:
        return f"scales its rotary positions by {rotation(config)['rope_type']!r}, which is not written yet"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "attends within a sliding window, which llama.cpp does not do for this architecture"
    if kind == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        return "scales attention in a way that llama.cpp's gpt2 does not know"
    act = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if act not in ACTIVATIONS.get(kind, ("silu",)):
        return f"has the activation {act!r}, which llama.cpp does not compute for this architecture"
    return None


def rotation(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return the parameters of the rotary positions."""
    return getattr(config, "rope_parameters", None) or {}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, with its hyperparameters by key, {arch} left open."""

    name: str
    keys: Mapping[str, bool | int | float | list[int]]


def describe(model: PreTrainedModel, widths: Sequence[int]) -> Architecture:
    """Return the architecture of a plain transformers `model` whose layers have these widths."""
    config, uneven = model.config, len(set(widths)) > 1
    name = "deci" if uneven else NAMES[config.model_type]
    heads, layers = config.num_attention_heads, len(widths)
    keys: dict[str, bool | int | float | list[int]] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": layers,
        "feed_forward_length": list(widths) if uneven else widths[0],
        "attention.head_count": [heads] * layers if uneven else heads,
        "vocab_size": config.vocab_size,
    }
    if config.model_type in LEARNED:
        epsilon = config.layer_norm_epsilon if name == "gpt2" else config.layer_norm_eps
        keys |= {"attention.layer_norm_epsilon": float(epsilon), "attention.causal": name == "gpt2"}
        return Architecture(name, keys)
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys |= {
        "attention.head_count_kv": [groups] * layers if uneven else groups,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.freq_base": float(rotation(config)["rope_theta"]),
    }
    return Architecture(name, keys)


def rotary_factors(model: PreTrainedModel) -> torch.Tensor | None:
    """Return what each rotary frequency is divided by, (head_dim / 2,) float32; None where nothing is scaled."""
    given = rotation(model.config)
    if given.get("rope_type", "default") == "default":
        return None
    scaled = model.base_model.rotary_emb.inv_freq.float().cpu()
    steps = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return float(given["rope_theta"]) ** -steps / scaled


def lies_transposed(name: str, weight: torch.Tensor, arch: str) -> bool:
    """Return True for a weight that transformers holds as (inputs, outputs): a Conv1D's."""
    return arch == "gpt2" and name.endswith(".weight") and weight.dim() == 2 and ".h." in f".{name}"


def turned(name: str, weight: torch.Tensor, config: PretrainedConfig, arch: str) -> torch.Tensor:
    """Return the weight `name` of transformers in the order in which llama.cpp reads it: (outputs, inputs)."""
    if lies_transposed(name, weight, arch):
        return weight.T
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    role = name.split(".")[-2]
    if arch not in ROTATED or role not in heads:
        return weight
    count = heads[role] or config.num_attention_heads
    halves = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
