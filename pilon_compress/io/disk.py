"""Write durably: files and folders are made beside their place, flushed, and renamed; a full disk is recognised.

atomic_file, atomic_folder    appear complete under their name, or not at all: after an error, a signal or a kill
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pilon_compress.errors import BadInput
from pilon_compress.io import signals

OLD = ".old"  # ending of a replaced folder until the new one has its name
FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}


class DiskFull(BadInput):
    """Raised when the disk is full; `reason` is the system's. The same command continues once there is room."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def disk_full(error: BaseException) -> str | None:
    """Return the reason if `error` reports a full disk, else None."""
    if isinstance(error, DiskFull):
        return error.reason
    if isinstance(error, OSError) and error.errno in FULL:
        return FULL[error.errno]
    text = str(error)  # safetensors and tokenizers wrap the operating system's error in their own
    known = {f"os error {number})": reason for number, reason in FULL.items()}
    known |= {os.strerror(number): reason for number, reason in FULL.items()}
    return next((reason for words, reason in known.items() if words in text), None)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk. Raises OSError for a file that cannot be flushed."""
    folder = path.is_dir()
    try:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        if not folder and error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders cannot be flushed everywhere
            raise


def sync_tree(folder: Path) -> None:
    """Flush `folder` and every file and folder below it."""
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def rename(source: Path, target: Path) -> None:
    """Rename to a free name, and flush the folder that holds it."""
    source.rename(target)
    sync(target.parent)


def replace(source: Path, target: Path) -> None:
    """Rename a file, replacing another of the new name, and flush the folder that holds it."""
    source.replace(target)
    sync(target.parent)


def write_atomic(path: Path, text: str) -> None:
    """Write a small UTF-8 file that appears complete under its name, or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, "utf-8")


def part_of(path: Path) -> Path:
    """Return the name beside `path` under which it is made."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write beside `path`.

    When the block succeeds, the file is flushed and renamed to `path`; otherwise it is deleted.
    """
    part = part_of(path)
    with signals.cleanup(lambda: part.unlink(missing_ok=True)):
        try:
            yield part
            sync(part)
            replace(part, path)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, finish: Callable[[Path], None] | None = None, work: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder to fill beside `path`; `work` is its name, `part_of(path)` unless given.

    When the block succeeds, `finish` is called on the folder (`manifest.write`), every file is flushed, and the folder
    is renamed to `path`; another folder of that name is deleted only then. After an error the new folder is deleted.
    """
    work = work or part_of(path)
    for leftover in (work, work.with_suffix(OLD)):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with signals.cleanup(lambda: shutil.rmtree(work, ignore_errors=True)):
        try:
            work.mkdir(parents=True)
            yield work
            if finish is not None:
                finish(work)
            sync_tree(work)
            _put(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _put(work: Path, path: Path) -> None:
    """Rename the complete folder `work` to `path`; a folder there is deleted afterwards."""
    with signals.guarded():
        if not path.exists():
            rename(work, path)
            return
        old = work.with_suffix(OLD)
        rename(path, old)
        try:
            rename(work, path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def move_into(work: Path, folder: Path, last: str) -> None:
    """Flush every entry of `work` and move it into `folder`; the file `last`, moved last, makes the others valid."""
    sync_tree(work)
    for path in sorted(work.iterdir(), key=lambda path: path.name == last):
        if path.name == last:
            sync(folder)
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        replace(path, folder / path.name)
    work.rmdir()


def read_bounded(path: Path, limit: int) -> str:
    """Return the text (UTF-8, with or without BOM) of a regular file of at most `limit` bytes.

    Raises OSError for anything but a regular file, ValueError for a longer one or for text that is not UTF-8.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:  # a pipe would block
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(min(limit, status.st_size) + 1)  # memory for all that is asked for is taken at once
    if len(data) > limit:
        raise ValueError(f"longer than {limit:,} bytes")
    return data.decode("utf-8-sig")
