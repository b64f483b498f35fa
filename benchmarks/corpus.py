"""Collect text on a machine without network: source code and documentation of installed packages."""

import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

KINDS = (".py", ".pyi", ".md", ".rst")
SMALLEST, LARGEST = 500, 200_000  # characters of a file
SKIPPED = {"__pycache__", "node_modules", ".git"}


def files() -> list[Path]:
    """Return the source files below the library folders, in an order that does not depend on the file system."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    roots |= {Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")}
    keys = {}
    for root in sorted(roots):
        for folder, inner, names in os.walk(root):
            inner[:] = sorted(set(inner) - SKIPPED)
            for name in names:
                path = Path(folder, name)
                if path.suffix in KINDS:
                    keys[path] = blake2b(str(path.relative_to(root)).encode(), digest_size=8).digest()
    return sorted(keys, key=lambda path: keys[path])


def documents(megabytes: float) -> Iterator[str]:
    """Yield the text of distinct files, up to so many megabytes."""
    seen, size = set(), 0
    for path in files():
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        mark = blake2b(text.encode(), digest_size=8).digest()
        if SMALLEST <= len(text) <= LARGEST and mark not in seen:
            seen.add(mark)
            size += len(text)
            yield text
        if size > megabytes * 1e6:
            return


def write(path: Path, megabytes: float) -> Path:
    """Write the documents to a jsonl file, unless it exists, and return its path."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("w") as file:
            for text in documents(megabytes):
                file.write(json.dumps({"text": text}) + "\n")
        part.rename(path)
    return path
