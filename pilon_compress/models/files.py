"""Which files hold a model's weights, as transformers would choose them, and whether they are whole."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pilon_compress.errors import BadInput

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers reads in `folder`: model.safetensors, else those of the index.

    Other safetensors files beside them (an older checkpoint, moving averages, an adapter) are not the model. Raises
    BadInput where weights are missing, pickled only, an adapter's only, or lie outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / "adapter_model.safetensors").is_file() or (folder / "adapter_config.json").is_file():
        raise BadInput(f"{folder} holds an adapter (LoRA) alone: merge it into its base model and save that")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise BadInput(f"{folder} holds only pickled weights (.bin), which are not loaded; save it as safetensors")
    stray = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f" under the name {SINGLE} (there is {stray[0]})" if stray else ""
    raise BadInput(f"{folder} holds no weights{hint}")


def _indexed(folder: Path) -> list[Path]:
    index = folder / INDEX
    try:
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        paths = sorted(folder / name for name in named)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{index} is not a weight index: {_first_line(error)}") from None
    if not paths:
        raise BadInput(f"{index} is not a weight index: it names no file")
    for path in paths:
        if path.suffix != ".safetensors":
            raise BadInput(f"{index} names {path.name}, which is no safetensors file")
        if path.parent != folder:
            raise BadInput(f"{index} names {path}, which is outside the folder")
        if not path.is_file():
            raise BadInput(f"{folder} lacks {path.name}, which its index names")
    return paths


def check_weights(folder: Path) -> None:
    """Open the weight files and read their headers, which also checks their lengths. Raises BadInput."""
    for path in weight_files(folder):
        _opened(path)


def stored_dtype(files: list[Path]) -> torch.dtype | None:
    """Return the floating-point type that most numbers in `files` have; None where there is none."""
    counts: Counter[torch.dtype] = Counter()
    for path in files:
        for kind, numbers in _opened(path):
            if kind in DTYPES:
                counts[DTYPES[kind]] += numbers
    return counts.most_common(1)[0][0] if counts else None


def _opened(path: Path) -> list[tuple[str, int]]:
    """(dtype, numbers) of every tensor. Raises BadInput for a file that is truncated or no safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
            return [(one.get_dtype(), torch.Size(one.get_shape()).numel()) for one in slices]
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} is truncated or corrupt: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
