"""What a conversion has finished, kept beside its output, so that one that was cut off goes on where it stopped."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pilon_compress.deploy.save import disk_full
from pilon_compress.errors import BadInput


def partial_folder(output: Path) -> Path:
    """Where unfinished work for `output` is kept: beside it."""
    return output.absolute().parent / f".{output.name}.partial"


def claimed(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds work made under `fingerprint`, the sum of everything that the work depends on."""
    mark = folder / "fingerprint"
    return mark.is_file() and mark.read_text("utf-8") == fingerprint


def claim(folder: Path, fingerprint: str) -> None:
    """Make an empty `folder` for work under `fingerprint`; what it held is dropped."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "fingerprint").write_text(fingerprint, "utf-8")


class Journal:
    """Named results in `.NAME.partial` beside the output `NAME`, each written whole under its name or not at all.

    The folder holds the `fingerprint` of everything that the results depend on; results made under another one are
    dropped. Without an output nothing is kept.
    """

    def __init__(self, output: Path | None = None, fingerprint: str = "") -> None:
        self.folder = None if output is None else partial_folder(output)
        self._made: list[Path] = []
        if self.folder is not None and not claimed(self.folder, fingerprint):
            self._made = [parent for parent in self.folder.parents if not parent.exists()]
            claim(self.folder, fingerprint)

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep a result; once this returns it survives whatever happens next."""
        if self.folder is None:
            return
        path = self._path(name)
        part = path.with_suffix(".part")
        save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, part)
        part.rename(path)

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The result of that name, if there is a whole one."""
        if self.folder is None or not self._path(name).is_file():
            return None
        try:
            # copies: products of memory that the file happens to align otherwise round otherwise
            return {key: tensor.clone() for key, tensor in load_file(self._path(name)).items()}
        except (SafetensorError, OSError):
            return None

    def put_plain(self, name: str, value: Any) -> None:
        """The same for plain data."""
        text = json.dumps(value).encode()
        self.put(name, {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)})

    def get_plain(self, name: str) -> Any:
        found = self.get(name)
        return None if found is None else json.loads(bytes(found["json"].tolist()))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def remove(self) -> None:
        """Forget everything: the output is there, or will never be."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made:  # nearest first; one that holds the output stays
            with suppress(OSError):
                parent.rmdir()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Work whose results are kept here. What cannot be mended by running it again leaves nothing behind.

        Raises BadInput when the disk is full.
        """
        try:
            yield
        except BadInput:
            self.remove()
            raise
        except (OSError, SafetensorError) as error:
            reason = disk_full(error)
            if reason is None:
                raise
            self.remove()
            raise BadInput(f"cannot write {self.folder}: {reason}; nothing was kept") from error
