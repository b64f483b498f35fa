"""Find the transformer blocks of a model, and the part of it that reads text; every command uses this rule."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.models.task import text_config


def blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the transformer blocks of `model` (dense or PILON), first to last, by module name below the base model.

    Raises BadInput as `block_path` does.
    """
    path = block_path(model)
    return {f"{path}.{index}": block for index, block in model.base_model.get_submodule(path).named_children()}


def passes(model: PreTrainedModel) -> list[str]:
    """Return the names of the blocks in the order in which the model runs them.

    Every block runs once, except in ALBERT, which repeats a few blocks up to the depth that the config states.
    """
    names = list(blocks(model))
    config = text_config(model.config)
    depth, groups = getattr(config, "num_hidden_layers", None), getattr(config, "num_hidden_groups", None)
    if groups is None or depth is None or len(names) != groups:
        return names
    return [names[int(index / (depth / groups))] for index in range(depth)]


def check_once(model: PreTrainedModel) -> None:
    """Raise BadInput for a model that runs a block more than once: no layer can then be fitted on its own."""
    names = passes(model)
    if len(set(names)) < len(names):
        raise BadInput(
            f"{type(model).__name__} runs {len(set(names))} blocks {len(names)} times, with the same weights: "
            "it cannot be converted layer by layer"
        )


def block_path(model: PreTrainedModel) -> str:
    """Return the path below the base model of the ModuleList that holds the transformer blocks.

    Candidates are the text tower's lists that lie in no other list and whose members have submodules. The path is that
    of the candidate as long as the config's depth, or else of the longest. Raises BadInput for a model without
    candidates, or one that does not read token ids.
    """
    check_reads_tokens(model)
    root, tower = text_tower(model)
    lists = dict(_outer_lists(tower))
    if not lists:
        raise BadInput(f"{type(model).__name__} has no list of transformer blocks: it cannot be converted")
    depth = getattr(text_config(model.config), "num_hidden_layers", None)
    fitting = [name for name, module in lists.items() if len(module) == depth]
    names = fitting or [name for name, module in lists.items() if len(module) == max(map(len, lists.values()))]
    name = max(names, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return f"{root}.{name}" if root else name


def text_tower(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """Return the path below the base model, and the module, of the part that processes text.

    That is the base model itself (path "") except in models of several towers (vision or audio and language).
    """
    base = model.base_model
    config = text_config(base.config)
    if type(config) is type(base.config):
        return "", base
    for name, module in base.named_modules():  # outermost first
        if name and isinstance(module, PreTrainedModel) and type(module.config) is type(config):
            return name, module
    return "", base


def check_reads_tokens(model: PreTrainedModel) -> None:
    """Raise BadInput for a model that does not run on token ids alone.

    Such models read images, audio or pairs of image and text, or are an encoder and a decoder together.
    """
    base, name = model.base_model, type(model).__name__
    parameters = inspect.signature(type(base).forward).parameters
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        raise BadInput(f"{model.config.model_type} is an encoder-decoder model, which is not supported")
    input_name = getattr(base, "main_input_name", "input_ids")
    if input_name != "input_ids":
        raise BadInput(f"{name} reads {input_name}, not token ids: only text models can be converted")
    if "return_loss" in parameters:  # contrastive pairs: CLIP, SigLIP, CLAP
        raise BadInput(f"{name} reads pairs of text and other input: only text models can be converted")


def _outer_lists(tower: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield name and module of the ModuleLists whose members all have submodules.

    Lists inside other lists, or inside a tower that reads images or audio, are left out.
    """
    closed: list[str] = []
    for name, module in tower.named_modules():
        if name.startswith(tuple(closed)):
            continue
        if getattr(module, "main_input_name", "input_ids") != "input_ids":
            closed.append(f"{name}.")
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        closed.append(f"{name}.")
        if all(_has_parts(child) for child in module):
            yield name, module


def _has_parts(module: Any) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
