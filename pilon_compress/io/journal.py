"""The journal of a conversion: finished results beside its output, so that one that was cut off goes on from them.

.NAME.partial/
  fingerprint            of everything that the results depend on
  nonce                  tells this journal from others; the finished output's manifest repeats it
  RESULT.safetensors     a result, with its checksum in RESULT.sha256
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
from pilon_compress.io.disk import DiskFull, disk_full, read_bounded, whole_file, write_whole
from pilon_compress.io.folders import NONCE, discard_journal, partial_folder

log = logging.getLogger(__name__)

T = TypeVar("T")
MARK, LIMIT = "fingerprint", 1 << 16


def claimed(folder: Path, fingerprint: str) -> bool:
    """True if `folder` holds work made under `fingerprint`; says so where it holds work that is damaged or other."""
    try:
        if read_bounded(folder / MARK, LIMIT) == fingerprint and (folder / NONCE).is_file():
            return True
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        pass
    log.warning("%s holds work on another model, text or recipe, or is damaged: it is made again", folder)
    return False


def claim(folder: Path, fingerprint: str) -> None:
    """Make an empty `folder` for work under `fingerprint`; what it held is dropped."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_whole(folder / NONCE, secrets.token_hex(16))
    write_whole(folder / MARK, fingerprint)


class Journal:
    """Named results in `.NAME.partial` beside the output `NAME`, each written whole under its name or not at all.

    The folder holds the `fingerprint` of everything that the results depend on; results made under another one are
    dropped, damaged ones are made again, with one line. Without an output nothing is kept.
    """

    def __init__(self, output: Path | None = None, fingerprint: str = "") -> None:
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
        """Keep a result; once this returns it survives whatever happens next."""
        if self.folder is None:
            return
        path = self._path(name)
        with whole_file(path) as part:
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, part)
            write_whole(self._sum(path), digest(part))

    def get(self, name: str, read: Callable[[dict[str, Tensor]], T] | None = None) -> Any:
        """The result of that name, as `read` makes it of the tensors; None if there is none, or it is damaged."""
        if self.folder is None or not self._path(name).is_file():
            return None
        path = self._path(name)
        try:
            if read_bounded(self._sum(path), LIMIT) != digest(path):
                raise ValueError("its checksum differs")
            # copies: products of memory that the file happens to align otherwise round otherwise
            tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
            return tensors if read is None else read(tensors)
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            log.warning("%s is damaged (%s): it is made again", path, str(error).splitlines()[0])
            return None

    def put_plain(self, name: str, value: Any) -> None:
        """Keep plain data, as JSON."""
        text = json.dumps(value).encode()
        self.put(name, {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)})

    def get_plain(self, name: str) -> Any:
        return self.get(name, lambda found: json.loads(bytes(found["json"].tolist())))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    @staticmethod
    def _sum(path: Path) -> Path:
        return path.with_suffix(".sha256")

    def remove(self) -> None:
        """Forget everything: the output is there, or will never be."""
        if self.output is not None:
            discard_journal(self.output)
        for parent in self._made:  # nearest first; one that holds the output stays
            with suppress(OSError):
                parent.rmdir()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Work whose results are kept here. Bad input, which running it again cannot mend, leaves nothing behind.

        A full disk keeps what is finished. Raises DiskFull.
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
                f"cannot write beside {self.folder}: {reason}; finished work is kept there, and the same command goes "
                "on from it once there is room",
                reason,
            ) from error
