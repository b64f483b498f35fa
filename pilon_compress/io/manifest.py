"""A folder's manifest: written with the folder, verified by every command that reads it."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from pilon_compress.errors import BadInput
from pilon_compress.io.checksum import MANIFEST, damage, describe_files, read_manifest
from pilon_compress.io.disk import read_bounded, write_whole

WEIGHTS = (".safetensors",)
JSON_LIMIT = 1 << 26  # bytes of a JSON file of ours that is read


def write(folder: Path, **more: Any) -> None:
    """Write `manifest.json`: size and SHA-256 of every file below `folder` but pages for people, and `more`."""
    write_whole(folder / MANIFEST, json.dumps({"format": 1, "files": describe_files(folder), **more}, indent=1) + "\n")


def refresh(folder: Path) -> None:
    """Describe the files that the manifest of `folder` lists again, after they were changed on purpose."""
    found = read_manifest(folder)
    if found is not None:
        found["files"] = describe_files(folder, found["files"])
        write_whole(folder / MANIFEST, json.dumps(found, indent=1) + "\n")


def verify_folder(folder: str | Path, *, weights: bool = True) -> None:
    """Raise BadInput if a file of `folder` is not as its manifest lists it. Without a manifest there is nothing to do.

    `weights=False` leaves the tensor files out: config, tokenizer and code are small. A file is hashed once per
    process while it stays as it is.
    """
    if reason := damage(Path(folder), spare=() if weights else WEIGHTS):
        raise BadInput(
            f"{reason}: the file is damaged, fetch or make the folder again "
            f"(changed on purpose? then delete its {MANIFEST})"
        )


def write_json(path: Path, data: Any) -> None:
    """Write `data` with its checksum, whole or not at all; `read_json` reads it back."""
    write_whole(path, json.dumps({"sha256": _sum(data), "data": data}))


def read_json(path: Path) -> Any:
    """Return the data that `write_json` wrote; None where there is no such file, or it is damaged."""
    try:
        found = json.loads(read_bounded(path, JSON_LIMIT))
        return found["data"] if found["sha256"] == _sum(found["data"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _sum(data: Any) -> str:
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_ours(path: Path) -> dict[str, Any]:
    """A JSON object that a command of ours wrote, such as report.json. Raises BadInput for anything else."""
    try:
        found = json.loads(read_bounded(path, JSON_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is damaged: it holds no JSON object")
    return found
