"""Store tensors by name: in memory up to a limit, the rest in safetensors files."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pilon_compress.io.checksum import digest

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of floating-point numbers by their names in safetensors files."""


class TensorStore:
    """Tensors by name: in memory up to `limit` bytes, further ones in `folder`, one safetensors file each.

    Without a folder all stay in memory.
    """

    def __init__(self, folder: Path | None = None, limit: int = 0) -> None:
        self.folder, self.limit, self.held = folder, limit, 0
        self._memory: dict[str, Tensor] = {}
        self._files: dict[str, tuple[Path, torch.device]] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Store `tensor`, which must not change afterwards, under `name`, replacing another."""
        self.drop(name)
        if self.folder is None or self.held + tensor.nbytes <= self.limit:
            self._memory[name] = tensor
            self.held += tensor.nbytes
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        save_file({"tensor": tensor.detach().cpu().contiguous().clone()}, path)
        self._files[name] = (path, tensor.device)

    def get(self, name: str) -> Tensor:
        """Return the tensor `name`, on the device that it came from. Raises KeyError where there is none."""
        if name in self._memory:
            return self._memory[name]
        path, device = self._files[name]
        # a copy, since matrix products round differently when the file's memory is aligned differently
        return load_file(path)["tensor"].clone().to(device)

    def adopt(self, names: Iterable[str], device: torch.device) -> None:
        """Add tensors that an earlier store left in the same folder. Raises KeyError where a file is missing."""
        for name in names:
            path = self._path(name)
            if not path.is_file():
                raise KeyError(name)
            self._files[name] = (path, device)

    def checksums(self) -> dict[str, str]:
        """Return the SHA-256 of the file of each tensor that is in one."""
        return {name: digest(path) for name, (path, _) in self._files.items()}

    def damage(self, checksums: dict[str, str]) -> str | None:
        """Return a sentence about the first file in `checksums` that is missing or damaged; None if none is."""
        for name, known in checksums.items():
            path = self._path(name)
            if not path.is_file() or digest(path) != known:
                return f"{path} is {'damaged' if path.is_file() else 'missing'}"
        return None

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [*self._memory, *self._files]

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name.replace('/', '_')}.safetensors"

    def take(self, name: str) -> Tensor:
        """Remove the tensor `name` and return it. Raises KeyError where there is none."""
        tensor = self.get(name)
        self.drop(name)
        return tensor

    def drop(self, name: str) -> None:
        """Delete the tensor `name`, if it is there."""
        if name in self._memory:
            self.held -= self._memory.pop(name).nbytes
        elif name in self._files:
            self._files.pop(name)[0].unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return name in self._memory or name in self._files

    def clear(self) -> None:
        """Delete all tensors and the folder."""
        self._memory.clear()
        self._files.clear()
        self.held = 0
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
