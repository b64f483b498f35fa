"""Find and check the weight files in a model folder: those that transformers would load."""

import json
from collections import Counter
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from pilon_compress.errors import BadInput
from pilon_compress.io.errors import first_line
from pilon_compress.io.tensor_store import FLOATS

INDEX_SUFFIX = ".safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the model in `folder`, sorted, resolved as transformers does.

    They are the file that config.json names (`transformers_weights`), else model.safetensors, else the files that
    model.safetensors.index.json names. Raises BadInput where there is none (pickled weights only, an adapter only),
    where one is missing, or where a name leads out of the folder.
    """
    named = _read(folder / CONFIG_NAME).get("transformers_weights") if (folder / CONFIG_NAME).is_file() else None
    if named is not None:
        entry = _inside(folder, named, CONFIG_NAME)
        return _indexed(folder, entry) if entry.name.endswith(INDEX_SUFFIX) else [entry]
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return _indexed(folder, folder / SAFE_WEIGHTS_INDEX_NAME)
    raise BadInput(f"{folder} holds {_reason(folder)}")


def _indexed(folder: Path, index: Path) -> list[Path]:
    files = _read(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise BadInput(f"{index} is not a weight index: it has no weight_map of file names")
    return [_inside(folder, name, index.name) for name in sorted(set(files.values()))]


def _inside(folder: Path, name: object, source: str) -> Path:
    """Return the safetensors file or index `name` below the folder. Raises BadInput where it is missing or outside."""
    parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name else ()
    if (
        not parts
        or ".." in parts
        or PurePosixPath(*parts).is_absolute()
        or not str(name).endswith((".safetensors", INDEX_SUFFIX))
    ):
        raise BadInput(f"{folder / source} names {name!r}, which is no safetensors file in the folder")
    path = folder.joinpath(*parts)
    if not path.is_file():
        raise BadInput(f"{folder} lacks {name}, which {source} names")
    return path


def _reason(folder: Path) -> str:
    """Return a phrase for what the folder holds instead of weights that can be loaded."""
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return "an adapter (LoRA), not a model: merge it into its base model and save that"
    if any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()):
        return "only pickled weights (.bin), which are not loaded; save it as safetensors"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"no {SAFE_WEIGHTS_NAME} and no index, only {others[0]}, which transformers would not load"
    return "no weights"


def _read(path: Path) -> dict[str, object]:
    """Return the JSON object in a file. Raises BadInput for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {str(error).splitlines()[0] or type(error).__name__}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object")
    return content


def check_readable(folder: Path) -> None:
    """Raise BadInput for a folder that holds pickled weights or an adapter only; a folder without weights passes."""
    if not any(path.suffix == ".safetensors" and not path.name.startswith("adapter_") for path in folder.iterdir()):
        reason = _reason(folder)
        if reason != "no weights":
            raise BadInput(f"{folder} holds {reason}")


def check_weights(folder: Path) -> None:
    """Open the weight files and read their headers, which also checks their lengths. Raises BadInput."""
    for path in weight_files(folder):
        _opened(path)


def stored_dtype(files: list[Path]) -> torch.dtype | None:
    """Return the floating-point dtype of most weights in `files`; None where no tensor is floating-point."""
    counts: Counter[torch.dtype] = Counter()
    for path in files:
        for kind, size in _opened(path):
            if kind in FLOATS:
                counts[FLOATS[kind]] += size
    return counts.most_common(1)[0][0] if counts else None


def _opened(path: Path) -> list[tuple[str, int]]:
    """Return (dtype, size) of every tensor. Raises BadInput for a file that is truncated or not safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
            return [(one.get_dtype(), torch.Size(one.get_shape()).numel()) for one in slices]
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} is truncated or corrupt: {first_line(error)}") from error
