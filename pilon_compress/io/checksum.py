"""Write and compare checksums of a folder's files, in `manifest.json`. Self-contained exports include this file.

{"format": 1, "files": {"model.safetensors": {"size": 123, "sha256": "..."}}, ...}
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1 << 26  # bytes; a longer manifest is refused
UNLISTED = (".md", ".html", ".png", ".jsonl")  # endings of pages that people may edit, and of a log that grows

_digests: dict[str, tuple[tuple[int, int, int, int], str]] = {}


def digest(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal; cached per process until the file changes.

    Raises OSError for anything but a regular file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    key = os.path.realpath(path)
    if key not in _digests or _digests[key][0] != state:
        sha256 = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
        _digests[key] = state, sha256.hexdigest()
    return _digests[key][1]


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return size and checksum by name of files below `folder`: of `names`, or of all but UNLISTED and the manifest."""
    if names is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in UNLISTED)
        names = [path.relative_to(folder).as_posix() for path in paths]
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        for name in names
        if name != MANIFEST
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder; None where there is none. Raises ValueError for a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise ValueError("too long")
        manifest = json.loads(path.read_bytes())
        for name, entry in manifest["files"].items():
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
                raise ValueError(f"it names {name!r}")
            if set(entry) != {"size", "sha256"} or type(entry["size"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"its entry {name!r} is not a checksum")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return dict(manifest)


def damage(folder: Path, suffixes: tuple[str, ...] = (), *, spare: tuple[str, ...] = ()) -> str | None:
    """Return a sentence about the first file that differs from the folder's manifest; None if none does.

    `suffixes`: endings of the names to check, () for all. `spare`: endings of names to skip. A folder without manifest
    passes.
    """
    try:
        manifest = read_manifest(folder)
        for name, entry in (manifest or {"files": {}})["files"].items():
            if suffixes and not name.endswith(suffixes) or spare and name.endswith(spare):
                continue
            path = folder / name
            if not path.is_file():
                return f"{path} is missing, but {MANIFEST} lists it"
            if path.stat().st_size != entry["size"]:
                return f"{path} has {path.stat().st_size:,} bytes, but {MANIFEST} says {entry['size']:,}"
            if digest(path) != entry["sha256"]:
                return f"{path} differs from its checksum in {MANIFEST}"
    except (OSError, ValueError) as error:
        return str(error)
    return None
