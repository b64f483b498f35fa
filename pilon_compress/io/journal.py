"""Keep the finished results of a conversion beside its output, so that an interrupted one continues from them.

.NAME.partial/
  fingerprint            hash of all that the results depend on
  nonce                  random identity of this journal, which the finished output's manifest repeats
  RESULT.safetensors     tensors of a result, with their checksum in RESULT.sha256
"""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pilon_compress.errors import BadInput
from pilon_compress.io.checksum import digest
from pilon_compress.io.disk import DiskFull, atomic_file, disk_full, read_bounded, write_atomic
from pilon_compress.io.folders import NONCE, discard_journal, partial_folder

log = logging.getLogger(__name__)

T = TypeVar("T")
MARK, LIMIT = "fingerprint", 1 << 16  # file name; bytes of a mark or checksum that are read


def claimed(folder: Path, fingerprint: str) -> bool:
    """Return True if `folder` holds work under `fingerprint`; warn if it holds damaged work, or other work."""
    try:
        if read_bounded(folder / MARK, LIMIT) == fingerprint and (folder / NONCE).is_file():
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        pass
    log.warning("%s is damaged, or of another model, text or recipe: starting again", folder)
    return False


def claim(folder: Path, fingerprint: str) -> None:
    """Make an empty `folder` for work under `fingerprint`; its old contents are deleted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_atomic(folder / NONCE, secrets.token_hex(16))
    write_atomic(folder / MARK, fingerprint)


class Journal:
    """Named results in `.NAME.partial` beside the output `NAME`, each written completely or not at all.

    `fingerprint`: hash of all that the results depend on; results under another one are deleted, damaged ones are
    ignored with a warning. Without an output nothing is stored.
    """

    def __init__(self, output: Path | None = None, fingerprint: str = "") -> None:
        """Open the journal of `output`, or start it. Raises DiskFull."""
        self.output, self.folder = output, None if output is None else partial_folder(output)
        self._made: list[Path] = []
        if self.folder is not None and not claimed(self.folder, fingerprint):
            self._made = [parent for parent in self.folder.parents if not parent.exists()]
            try:
                claim(self.folder, fingerprint)
            except OSError as error:
                reason = disk_full(error)
                if reason is None:
                    raise
                self.remove()
                raise DiskFull(f"cannot write {self.folder}: {reason}; nothing was kept", reason) from error

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Store a result; it is on the disk when this returns."""
        if self.folder is None:
            return
        path = self._path(name)
        with atomic_file(path) as part:
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, part)
            write_atomic(self._sum(path), digest(part))

    def get(self, name: str, read: Callable[[dict[str, Tensor]], T] | None = None) -> Any:
        """Return the tensors of result `name`, or `read(tensors)`; None where it is missing or damaged."""
        if self.folder is None or not self._path(name).is_file():
            return None
        path = self._path(name)
        try:
            if read_bounded(self._sum(path), LIMIT) != digest(path):
                raise ValueError("its checksum differs")
            # copies, since matrix products round differently when the file's memory is aligned differently
            tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
            return tensors if read is None else read(tensors)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            log.warning("%s is damaged (%s): computing it again", path, str(error).splitlines()[0])
            return None

    def put_plain(self, name: str, value: Any) -> None:
        """Store plain data, as JSON."""
        text = json.dumps(value).encode()
        self.put(name, {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)})

    def get_plain(self, name: str) -> Any:
        """Return the plain data of `name`; None where it is missing or damaged."""
        return self.get(name, lambda tensors: json.loads(bytes(tensors["json"].tolist())))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    @staticmethod
    def _sum(path: Path) -> Path:
        return path.with_suffix(".sha256")

    def remove(self) -> None:
        """Delete the journal, and the parent folders that it made."""
        if self.output is not None:
            discard_journal(self.output)
        for parent in self._made:  # nearest first; rmdir fails for one that holds the output
            with suppress(OSError):
                parent.rmdir()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Delete the journal after BadInput inside the block, which another run would meet again.

        After a full disk the finished results stay. Raises DiskFull.
        """
        try:
            yield
        except Exception as error:
            reason = disk_full(error)
            if reason is None:
                if isinstance(error, BadInput):
                    self.remove()
                raise
            if self.folder is None or not any(self.folder.glob("*.safetensors")):
                self.remove()
                raise DiskFull(f"cannot write {self.folder}: {reason}; nothing was kept", reason) from error
            raise DiskFull(
                f"cannot write beside {self.folder}: {reason}; finished work is kept there, and the same command "
                "continues from it once there is room",
                reason,
            ) from error
