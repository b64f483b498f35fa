"""Write a folder's manifest, verify it, and read and write JSON files with checksums."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from pilon_compress.errors import BadInput
from pilon_compress.io.checksum import MANIFEST, damage, describe_files, read_manifest
from pilon_compress.io.disk import read_bounded, write_atomic

WEIGHTS = (".safetensors",)
JSON_LIMIT = 1 << 26  # bytes; a longer JSON file is refused


def write(folder: Path, **more: Any) -> None:
    """Write `manifest.json`: size and SHA-256 of every file below `folder` that is not UNLISTED, and `more`."""
    write_atomic(folder / MANIFEST, json.dumps({"format": 1, "files": describe_files(folder), **more}, indent=1) + "\n")


def refresh(folder: Path) -> None:
    """Update the sizes and checksums in the manifest of `folder`, after a command has changed its files."""
    content = read_manifest(folder)
    if content is not None:
        content["files"] = describe_files(folder, content["files"])
        write_atomic(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def verify_folder(folder: str | Path, *, weights: bool = True) -> None:
    """Raise BadInput if a file of `folder` differs from its manifest. A folder without manifest passes.

    `weights=False` skips the tensor files, since hashing them takes time. Each file is hashed once per process.
    """
    if reason := damage(Path(folder), spare=() if weights else WEIGHTS):
        raise BadInput(
            f"{reason}: the file is damaged, so fetch or make the folder again "
            f"(if you changed it on purpose, delete {MANIFEST})"
        )


def write_json(path: Path, data: Any) -> None:
    """Write `data` with its checksum, completely or not at all; `read_json` reads it back."""
    write_atomic(path, json.dumps({"sha256": _sum(data), "data": data}))


def read_json(path: Path) -> Any:
    """Return the data of a file of `write_json`; None where it is missing or damaged."""
    try:
        content = json.loads(read_bounded(path, JSON_LIMIT))
        return content["data"] if content["sha256"] == _sum(content["data"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _sum(data: Any) -> str:
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_ours(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that this package wrote (report.json). Raises BadInput for anything else."""
    try:
        content = json.loads(read_bounded(path, JSON_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is damaged: it holds no JSON object")
    return content
