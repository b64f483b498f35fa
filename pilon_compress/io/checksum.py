"""Checksums of a folder's files, in `manifest.json`. Bundled with self-contained exports: imports nothing of ours.

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
MANIFEST_LIMIT = 1 << 26  # bytes of a manifest that is read
FREE = (".md", ".html", ".png", ".jsonl")  # pages for people, and a log that grows

_digests: dict[str, tuple[tuple[int, int, int, int], str]] = {}


def digest(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal; computed once per process while the file stays as it is."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(f"{path} is not a regular file")
    state = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    key = os.path.realpath(path)
    if key not in _digests or _digests[key][0] != state:
        found = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        _digests[key] = state, found.hexdigest()
    return _digests[key][1]


def describe_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Size and checksum of files below `folder`, by name: of `names`, or of all but those in FREE and the manifest."""
    if names is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in FREE)
        names = [path.relative_to(folder).as_posix() for path in paths]
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        for name in names
        if name != MANIFEST
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none. Raises ValueError for one that is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MANIFEST_LIMIT:
            raise ValueError("too long")
        found = json.loads(path.read_bytes())
        for name, entry in found["files"].items():
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
                raise ValueError(f"it names {name!r}")
            if set(entry) != {"size", "sha256"} or type(entry["size"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"its entry {name!r} is no checksum")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return dict(found)


def damage(folder: Path, suffixes: tuple[str, ...] = (), *, spare: tuple[str, ...] = ()) -> str | None:
    """The first file that is not as the folder's manifest lists it, and how; None if all are, or nothing is listed.

    Only names that end in one of `suffixes` are looked at, where there are some, and none that ends in one of `spare`.
    """
    try:
        found = read_manifest(folder)
        for name, entry in (found or {"files": {}})["files"].items():
            if suffixes and not name.endswith(suffixes) or spare and name.endswith(spare):
                continue
            path = folder / name
            if not path.is_file():
                return f"{path} is missing, {MANIFEST} lists it"
            if path.stat().st_size != entry["size"]:
                return f"{path} has {path.stat().st_size:,} bytes, {MANIFEST} says {entry['size']:,}"
            if digest(path) != entry["sha256"]:
                return f"{path} differs from its checksum in {MANIFEST}"
    except (OSError, ValueError) as error:
        return str(error)
    return None
