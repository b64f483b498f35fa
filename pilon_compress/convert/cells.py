"""The finished cells of a comparison, kept on disk, so that an interrupted one goes on where it stopped."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pilon_compress.convert.journal import claim, claimed, partial_folder


class Cells:
    """Cells by key, in `.NAME.partial` beside the output `NAME`: one JSON line each, written through to the disk.

    The folder holds the `fingerprint` of everything that the cells depend on. Cells that were made under another one
    are dropped, and so is a last line that was cut short.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        self.folder = partial_folder(output)
        self.file, self.mark = self.folder / "cells.jsonl", self.folder / "fingerprint"
        self.found: dict[str, Any] = {}
        if not claimed(self.folder, fingerprint):
            claim(self.folder, fingerprint)
        elif self.file.is_file():
            self.found = _read(self.file)
            whole = self.folder / "whole.jsonl"
            whole.write_text("".join(_line(key, cell) for key, cell in self.found.items()), "utf-8")
            whole.replace(self.file)  # never half written, so that a crash here loses nothing

    def keep(self, key: str, cell: Any) -> None:
        """Add a finished cell; it survives whatever happens next."""
        self.found[key] = cell
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_line(key, cell))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _line(key: str, cell: Any) -> str:
    return json.dumps({"key": key, "cell": cell}) + "\n"


def _read(file: Path) -> dict[str, Any]:
    """The cells up to the first line that is none."""
    found = {}
    for line in file.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            found[entry["key"]] = entry["cell"]
        except (ValueError, TypeError, KeyError):
            break
    return found
