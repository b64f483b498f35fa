"""Text for measurements on a machine without network: the source code and documentation of what is installed there."""

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
    """Every readable source file below the library folders, in an order that does not depend on the machine's."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    roots |= {Path(folder) for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")}
    found = {}
    for root in sorted(roots):
        for folder, inner, names in os.walk(root):
            inner[:] = sorted(set(inner) - SKIPPED)
            for name in names:
                path = Path(folder, name)
                if path.suffix in KINDS:
                    found[path] = blake2b(str(path.relative_to(root)).encode(), digest_size=8).digest()
    return sorted(found, key=lambda path: found[path])


def documents(megabytes: float) -> Iterator[str]:
    """Distinct files as text, until there are so many megabytes of them."""
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
    """The documents as a jsonl file, made once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("w") as file:
            for text in documents(megabytes):
                file.write(json.dumps({"text": text}) + "\n")
        part.rename(path)
    return path
