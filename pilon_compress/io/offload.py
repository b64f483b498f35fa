"""Tensors that are put away until they are needed again: in memory up to a limit, in files beyond it."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pilon_compress.io.checksum import digest


class Shelf:
    """Tensors by name. Once those in memory fill `limit` bytes, further ones go to `folder`, one safetensors file each.

    `take` removes a tensor from the shelf, `get` leaves it there. Without a folder everything stays in memory.
    """

    def __init__(self, folder: Path | None = None, limit: int = 0) -> None:
        self.folder, self.limit, self.held = folder, limit, 0
        self._memory: dict[str, Tensor] = {}
        self._files: dict[str, tuple[Path, torch.device]] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep `tensor`, which must not be changed afterwards, under `name`."""
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
        """The tensor kept under `name`, on the device that it came from. Raises KeyError where there is none."""
        if name in self._memory:
            return self._memory[name]
        path, device = self._files[name]
        return (
            load_file(path)["tensor"].clone().to(device)
        )  # a copy: the file may align it otherwise, hence round otherwise

    def adopt(self, names: Iterable[str], device: torch.device) -> None:
        """Take over what an earlier shelf in the same folder left there. Raises KeyError where a file is missing."""
        for name in names:
            path = self._path(name)
            if not path.is_file():
                raise KeyError(name)
            self._files[name] = (path, device)

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the file of each tensor that is in one."""
        return {name: digest(path) for name, (path, _) in self._files.items()}

    def damage(self, checksums: dict[str, str]) -> str | None:
        """The first file, of an earlier shelf in the same folder, that is missing or damaged; None if all are whole."""
        for name, known in checksums.items():
            path = self._path(name)
            if not path.is_file() or digest(path) != known:
                return f"{path} is {'damaged' if path.is_file() else 'missing'}"
        return None

    def names(self) -> list[str]:
        return [*self._memory, *self._files]

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name.replace('/', '_')}.safetensors"

    def take(self, name: str) -> Tensor:
        tensor = self.get(name)
        self.drop(name)
        return tensor

    def drop(self, name: str) -> None:
        if name in self._memory:
            self.held -= self._memory.pop(name).nbytes
        elif name in self._files:
            self._files.pop(name)[0].unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return name in self._memory or name in self._files

    def clear(self) -> None:
        """Forget everything and delete the folder."""
        self._memory.clear()
        self._files.clear()
        self.held = 0
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
