"""Safe saving: a folder appears whole under its name, or not at all."""

import errno
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.deploy.loader import PilonConfig
from pilon_compress.errors import BadInput
from pilon_compress.form.layout import layout_of, stored_types

FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}


def check_output(path: Path, overwrite: bool, source: str = "") -> None:
    """Raise BadInput if `path` cannot become a fresh model folder: a file, or a non-empty folder without `overwrite`.

    With `overwrite` only a folder that holds a config.json is given up: a slip must not clear somebody's home. Never
    given up: `source`, the model that is being read, and the folder that the user stands in.
    """
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is a file; the output must be a folder")
    _check_replaceable(path, source)
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise BadInput(f"{path} is not empty; choose another output or pass --overwrite")
    if not (path / "config.json").exists():
        raise BadInput(f"{path} is not empty and holds no model, so --overwrite will not clear it")


def _check_replaceable(path: Path, source: str) -> None:
    """A finished folder takes its name by a rename, which must not fail after all the work is done."""
    if path.is_symlink() or path.absolute().is_mount():
        raise BadInput(f"{path} is a link or a mount point, which cannot be replaced: name a new folder inside it")
    whole = path.resolve()
    if source and Path(source).is_dir() and Path(source).resolve().is_relative_to(whole):
        raise BadInput(f"{path} holds the model that is read, and would be replaced: choose another output")
    if Path.cwd().is_relative_to(whole):
        raise BadInput(f"{path} is the folder you are in, which cannot be replaced: name a new folder inside it")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"cannot write to {parent}")


@contextmanager
def fresh_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well and vanishes when it does not.

    Raises BadInput as `check_output` does, and when the disk is full.
    """
    check_output(path, overwrite)
    made = [parent for parent in path.absolute().parents if not parent.exists()]  # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    work = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    work.mkdir()
    try:
        yield work
        if path.exists():
            old = path.parent / f".{path.name}.{secrets.token_hex(4)}.old"
            path.rename(old)
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
    except (OSError, SafetensorError) as error:
        if reason := disk_full(error):
            raise BadInput(f"cannot write {path}: {reason}; nothing was kept") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not path.exists():
            for parent in made:
                parent.rmdir()


def disk_full(error: Exception) -> str | None:
    """Why nothing more can be written, if that is what `error` says."""
    if isinstance(error, OSError) and error.errno in FULL:
        return FULL[error.errno]
    text = str(error)  # safetensors wraps the operating system's error in its own
    return next((reason for number, reason in FULL.items() if f"os error {number}" in text), None)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights (safetensors, in `dtype`), config and tokenizer of a PILON or dense model into a fresh `folder`."""
    layout = layout_of(model)
    if layout.projections or layout.kept:
        model.config.quantization_config = PilonConfig(layout.to_dict(), 2 if layout.quantized else 1)
    model.save_pretrained(folder, state_dict=_narrowed(model, dtype), max_shard_size=max_shard_size)
    model.config.dtype = dtype  # save_pretrained notes the dtype of the module, not of the state that it was given
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors writes for the owner only


def _narrowed(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state in `dtype`, but for what has a type of its own; tensors that were tied stay one, and are saved once."""
    own, made, state = stored_types(model), dict[int, Tensor](), dict[str, Tensor]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            plain = tensor.detach()
            made[id(tensor)] = plain.to(own.get(name, dtype)) if plain.is_floating_point() else plain
        state[name] = made[id(tensor)]
    return state


COMPANIONS = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def copy_companions(source: str, folder: Path) -> None:
    """Copy what sentence-transformers needs beside a model (pooling, module list) where a local `source` has it."""
    root = Path(source)
    if not (root / "modules.json").is_file():
        return
    modules = [root / module["path"] for module in json.loads((root / "modules.json").read_text()) if module["path"]]
    for path in [root / name for name in COMPANIONS] + [p for module in modules for p in module.glob("*.json")]:
        if path.is_file():
            target = folder / path.relative_to(root)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
