"""The finished cells of a comparison, kept on disk, so that an interrupted one goes on where it stopped."""

import json
import logging
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from pilon_compress.io.disk import DiskFull, disk_full, write_whole
from pilon_compress.io.folders import discard_journal, partial_folder
from pilon_compress.io.journal import MARK, claim, claimed

log = logging.getLogger(__name__)


class Cells:
    """Cells by key, in `.NAME.partial` beside the output `NAME`: one JSON line each, written through to the disk.

    The folder holds the `fingerprint` of everything that the cells depend on. Cells that were made under another one
    are dropped, and so are lines that are damaged or were cut short. Raises DiskFull.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.output, self.folder = output, partial_folder(output)
        self.file, self.mark = self.folder / "cells.jsonl", self.folder / MARK
        self.found: dict[str, Any] = {}
        try:
            if not claimed(self.folder, fingerprint):
                claim(self.folder, fingerprint)
            elif self.file.is_file():
                self.found = _read(self.file)
                write_whole(self.file, "".join(_line(key, cell) for key, cell in self.found.items()))
        except OSError as error:
            raise self._full(error) or error from error

    def keep(self, key: str, cell: Any) -> None:
        """Add a finished cell; it survives whatever happens next."""
        self.found[key] = cell
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_line(key, cell))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._full(error) or error from error

    def _full(self, error: OSError) -> DiskFull | None:
        reason = disk_full(error)
        words = f"cannot write {self.folder}: {reason}; finished cells are kept, and the same command goes on from them"
        return None if reason is None else DiskFull(words, reason)

    def remove(self) -> None:
        discard_journal(self.output)


def _line(key: str, cell: Any) -> str:
    return json.dumps({"key": key, "cell": cell, "sha256": _sum(key, cell)}) + "\n"


def _sum(key: str, cell: Any) -> str:
    return sha256(json.dumps([key, cell]).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    """The cells whose lines are whole."""
    found = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            if entry["sha256"] != _sum(entry["key"], entry["cell"]):
                raise ValueError("its checksum differs")
            found[entry["key"]] = entry["cell"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            log.warning("%s:%d is damaged: that cell is measured again", file, number)
    return found
