"""Durable writing: data reaches the disk before a rename relies on it, and a full disk is recognised."""

import errno
import os
import stat
from pathlib import Path

from pilon_compress.errors import BadInput

FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}


class DiskFull(BadInput):
    """Nothing more can be written: `reason` is the system's. The same command goes on once there is room."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def disk_full(error: BaseException) -> str | None:
    """Why nothing more can be written, if that is what `error` reports, else None."""
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
    """Flush every file and folder below `folder`, and itself."""
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def rename(source: Path, target: Path) -> None:
    """Rename to a name that is free, and flush the folder that holds it."""
    source.rename(target)
    sync(target.parent)


def replace(source: Path, target: Path) -> None:
    """Rename a file to a name that another may have, and flush the folder that holds it."""
    source.replace(target)
    sync(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a small UTF-8 file that appears whole under its name, or not at all."""
    part = part_of(path)
    part.write_text(text, "utf-8")
    sync(part)
    replace(part, path)


def part_of(path: Path) -> Path:
    """The file that `write_whole` fills before it takes its name."""
    return path.with_name(f".{path.name}.part")


def read_bounded(path: Path, limit: int) -> str:
    """The text (UTF-8, with or without BOM) of a regular file of at most `limit` bytes.

    Raises OSError for what is no regular file, ValueError for one that is longer, UnicodeDecodeError (a ValueError).
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:  # a pipe must not hold us up
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"longer than {limit:,} bytes")
    return data.decode("utf-8-sig")
