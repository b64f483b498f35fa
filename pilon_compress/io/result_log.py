"""Log the finished cells of a comparison on disk, so that an interrupted one continues from them."""

import json
import logging
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from pilon_compress.io.disk import DiskFull, disk_full, write_atomic
from pilon_compress.io.folders import discard_journal, partial_folder
from pilon_compress.io.journal import MARK, claim, claimed

log = logging.getLogger(__name__)


class ResultLog:
    """Cells by key in `.NAME.partial` beside the output `NAME`: one JSON line each, flushed to the disk.

    `fingerprint`: hash of all that the cells depend on; cells under another one are deleted, and so are damaged or
    truncated lines. `found`: all cells of the log.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        """Open the log of `output`, or start it. Raises DiskFull."""
        self.output, self.folder = output, partial_folder(output)
        self.file, self.mark = self.folder / "cells.jsonl", self.folder / MARK
        self.found: dict[str, Any] = {}
        try:
            if not claimed(self.folder, fingerprint):
                claim(self.folder, fingerprint)
            elif self.file.is_file():
                self.found = _read(self.file)
                write_atomic(self.file, "".join(_line(key, cell) for key, cell in self.found.items()))
        except OSError as error:
            raise self._full(error) or error from error

    def keep(self, key: str, cell: Any) -> None:
        """Add a finished cell; it is on the disk when this returns. Raises DiskFull."""
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
        if reason is None:
            return None
        kept = "finished cells are kept, and the same command continues from them"
        return DiskFull(f"cannot write {self.folder}: {reason}; {kept}", reason)

    def remove(self) -> None:
        """Delete the log."""
        discard_journal(self.output)


def _line(key: str, cell: Any) -> str:
    return json.dumps({"key": key, "cell": cell, "sha256": _sum(key, cell)}) + "\n"


def _sum(key: str, cell: Any) -> str:
    return sha256(json.dumps([key, cell]).encode()).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    """Return the cells of all intact lines, and warn of the others."""
    cells = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            if entry["sha256"] != _sum(entry["key"], entry["cell"]):
                raise ValueError("its checksum differs")
            cells[entry["key"]] = entry["cell"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            log.warning("%s:%d is damaged: measuring that cell again", file, number)
    return cells
