"""A model's own files: weights, config and tokenizer."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.export.registry import ExportJob
from pilon_compress.export.transformers_plugin import PilonConfig
from pilon_compress.io import companions
from pilon_compress.io.folders import fresh_folder
from pilon_compress.models import checkpoint
from pilon_compress.models.companions import companions_of
from pilon_compress.models.quiet import quiet_transformers
from pilon_compress.nn.installed import layout_of, stored_types

MODELING_FILE = "modeling_pilon.py"  # of a self-contained folder


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights (safetensors, in `dtype`), config and tokenizer of a PILON or dense model into a fresh `folder`."""
    declare(model, dtype)
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=_narrowed(model, dtype), max_shard_size=max_shard_size)
        model.config.dtype = dtype  # save_pretrained notes the dtype of the module, not of the state that it was given
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors writes for the owner only


def declare(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Say in the config which PILON layout a model has, if it has one, and the dtype of its plain numbers."""
    layout = layout_of(model)
    if layout.replaced:
        model.config.quantization_config = PilonConfig(layout.to_dict(), 2 if layout.quantized else 1)
    model.config.dtype = dtype


def _narrowed(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state in `dtype`, but for what has a type of its own; tensors that were tied stay one, and are saved once."""
    own, made, state = stored_types(model), dict[int, Tensor](), dict[str, Tensor]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            plain = tensor.detach()
            made[id(tensor)] = plain.to(own.get(name, dtype)) if plain.is_floating_point() else plain
        state[name] = made[id(tensor)]
    return state


def companions_without_code(source: str) -> dict[str, Path]:
    """Return the companion files of a model, but for the code that a self-contained folder loads by."""
    return {name: path for name, path in companions_of(source).items() if name != MODELING_FILE}


def save_beside(
    model: PreTrainedModel,
    job: ExportJob,
    dtype: torch.dtype,
    add: Callable[[Path], None] | None = None,
) -> None:
    """Write `model` in `dtype` to `job.output`, with the tokenizer and the companion files of `job.source`.

    `add` is called with the folder before it is in place, to write more files.
    """
    tokenizer, beside = checkpoint.load_tokenizer(job.source), companions_without_code(job.source)
    with fresh_folder(job.output, job.overwrite) as folder:
        save_model(model, tokenizer, folder, dtype)
        companions.copy(beside, folder)
        if add is not None:
            add(folder)


def drop_bundled(config: PretrainedConfig) -> None:
    """Remove, in place, the `auto_map` entries of a self-contained export: their code does not come along."""
    stem = MODELING_FILE.removesuffix(".py")
    named = getattr(config, "auto_map", None) or {}
    kept = {auto: place for auto, place in named.items() if not str(place).startswith(f"{stem}.")}
    if kept != named:
        config.auto_map = kept
    if named and not kept:
        del config.auto_map
