"""Exports Llama-shaped models in Deci's form: a width for every layer, which vLLM and others read from the config.

block_configs[i].ffn.ffn_mult             int(2 · ffn_mult · hidden ÷ 3), rounded up to 256      every reader
block_configs[i].ffn.intermediate_size    exactly                                                vLLM from 0.13
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pilon_compress.config.export import ExportOptions
from pilon_compress.export import dense
from pilon_compress.export.native import factors
from pilon_compress.export.registry import DEFAULTS, ExportJob, exporter
from pilon_compress.export.save import save_beside
from pilon_compress.export.verify import difference, outputs
from pilon_compress.models.blocks import blocks
from pilon_compress.nn.installed import layout_of
from pilon_compress.results.export import Exported

MULTIPLE = 256  # of widths that follow from `ffn_mult`
CODE = "configuration_decilm.py"
CONFIG = '''"""Config of a DeciLM checkpoint: that of Llama, with the form of each block."""

from types import SimpleNamespace

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **others):
        super().__init__(**others)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**form) for part, form in block.items()})
            for block in block_configs or []
        ]

    def to_dict(self):
        found = super().to_dict()
        found["block_configs"] = [
            {part: vars(form) for part, form in vars(block).items()} for block in self.block_configs
        ]
        return found
'''


class DeciExported(Exported):
    """An export in Deci's form."""

    widths: list[int] = []
    """Neurons of each layer."""
    readers: str = ""
    """Runtimes that read these widths."""


def refuse(model: PreTrainedModel, options: ExportOptions = DEFAULTS) -> str | None:
    """Say why Deci's form cannot describe `model`; None if it can."""
    if reason := dense.refuse(model, options) or factors(layout_of(model)):
        return reason
    config = model.config
    if config.model_type not in ("llama", "mistral") or not model.can_generate():
        return f"is a {config.model_type} model: Deci's form is for causal LMs of Llama's shape"
    if getattr(config, "sliding_window", None):
        return "attends within a sliding window, which Deci's form has no field for"
    return None


@exporter(
    "deci",
    about="Llama-shaped models with a width for every layer, in the form that vLLM and TensorRT-LLM read.",
    load="vllm.LLM({folder!r}, trust_remote_code=True)",
    refuse=refuse,
)
def write(model: PreTrainedModel, job: ExportJob) -> DeciExported:
    """Write the model; what was written is read again, and compared, before it is kept."""
    before, widths = outputs(model), widths_of(model)
    to_plain(model)
    measured = dict[str, Any]()

    def finish(folder: Path) -> None:
        place = folder / "config.json"
        place.write_text(
            json.dumps(deci_config(json.loads(place.read_text("utf-8")), widths), indent=2) + "\n", "utf-8"
        )
        (folder / CODE).write_text(CONFIG, encoding="utf-8")
        measured["max_logit_difference"] = difference(read_deci(folder), before, "deci")

    save_beside(model, job, model.dtype, finish)
    exact = all(width % MULTIPLE == 0 for width in widths)
    readers = "vLLM, TensorRT-LLM, SGLang, MLX-LM" if exact else "vLLM"
    return DeciExported(**measured, widths=widths, readers=readers)


def widths_of(model: PreTrainedModel) -> list[int]:
    """Return the neurons of each layer's feed-forward block."""
    layout, found = layout_of(model), []
    for name, block in blocks(model).items():
        down = f"{name}.mlp.down_proj"
        own = block.get_submodule("mlp.down_proj").in_features
        found.append(layout.shape(down)[0] if down in layout.replaced else int(own))  # type: ignore[arg-type]
    return found


def to_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Replace, in place, every projection of ours by a plain layer of the width that it has left."""
    widths = widths_of(model)
    dense.to_dense(model)
    _trim(model, widths)
    return model


@torch.no_grad()
def _trim(model: PreTrainedModel, widths: list[int]) -> None:
    """Take the padding of `dense.to_dense` off again, in place: neurons that are left are the first ones."""
    for block, width in zip(blocks(model).values(), widths, strict=True):
        for role in ("gate_proj", "up_proj", "down_proj"):
            layer: Any = block.get_submodule(f"mlp.{role}")
            weight = layer.weight[:, :width] if role == "down_proj" else layer.weight[:width]
            layer.weight = nn.Parameter(weight.contiguous())
            layer.out_features, layer.in_features = weight.shape
            if role != "down_proj" and layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[:width].contiguous())


def deci_config(config: dict[str, Any], widths: list[int]) -> dict[str, Any]:
    """Return the config in Deci's form of a model whose layers have these widths."""
    made, hidden = copy.deepcopy(config), config["hidden_size"]
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    attention = {"n_heads_in_group": heads // groups, "no_op": False, "replace_with_linear": False}
    exact = all(width % MULTIPLE == 0 for width in widths)
    made |= {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE.removesuffix('.py')}.DeciLMConfig"},
        "block_configs": [
            {
                "attention": attention,
                "ffn": {
                    **({"ffn_mult": 1.5 * width / hidden} if exact else {"intermediate_size": width}),
                    "no_op": False,
                    "replace_with_linear": False,
                },
            }
            for width in widths
        ],
    }
    return made


def width_of(ffn: dict[str, Any], hidden: int) -> int:
    """Return the neurons that a block's `ffn` declares."""
    if ffn.get("ffn_mult") is None:
        return int(ffn["intermediate_size"])
    inner = int(2 * ffn["ffn_mult"] * hidden / 3)
    return -(-inner // MULTIPLE) * MULTIPLE


def read_deci(folder: Path) -> PreTrainedModel:
    """Read a folder in Deci's form as a Llama whose blocks have the widths that its config declares."""
    told = json.loads((folder / "config.json").read_text("utf-8"))
    forms = told.pop("block_configs")
    plain = {key: value for key, value in told.items() if key not in ("model_type", "architectures", "auto_map")}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**plain))
    for block, form in zip(blocks(model).values(), forms, strict=True):
        width = width_of(form["ffn"], told["hidden_size"])
        for role in ("gate_proj", "up_proj", "down_proj"):
            shape = (width, told["hidden_size"]) if role == "down_proj" else (told["hidden_size"], width)
            biased = bool(told.get("mlp_bias"))
            block.set_submodule(f"mlp.{role}", nn.Linear(shape[0], shape[1], bias=biased, device="meta"))
    state = {name: t.float() for part in sorted(folder.glob("*.safetensors")) for name, t in load_file(part).items()}
    if told.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()
