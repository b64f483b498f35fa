"""Check the path of an output before any work is done: what it may be, and what it may replace."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pilon_compress.errors import BadInput
from pilon_compress.io.disk import DiskFull, disk_full

Kind = Literal["model", "comparison"]
MARKS: dict[Kind, str] = {"model": "config.json", "comparison": "compare.json"}  # file by which a result is recognised
BESIDE = len(f"..{'0' * 8}.part")  # bytes that the longest name beside an output adds to its own
INSIDE = 128  # bytes of the longest path below an output


def expanded(path: str | Path) -> Path:
    """Return `path` with `~` expanded and without `..`. Raises BadInput for names that no folder can have."""
    text = os.fspath(path)
    if "\0" in text or not text:
        raise BadInput(f"{text!r} cannot be the name of an output")
    try:
        text.encode()
        with_home = Path(text).expanduser()
    except UnicodeEncodeError:
        raise BadInput(f"{text!r} cannot be the name of an output: it is not valid UTF-8") from None
    except RuntimeError:
        raise BadInput(f"{text}: there is no such user, and so no home folder") from None
    return with_home.resolve() if ".." in with_home.parts else with_home


def check_output(path: str | Path, overwrite: bool, source: str = "", kind: Kind = "model") -> Path:
    """Return the expanded `path`. Raises BadInput if it cannot become a fresh folder of that `kind`.

    `overwrite` replaces only a folder that holds a result of that kind, so that a slip does not clear a home folder;
    never the model `source` that is being read, nor the working directory.
    """
    path = expanded(path)
    check_place(path, source)
    check_contents(path, overwrite, kind)
    return path


def check_place(path: Path, source: str) -> None:
    """Raise BadInput if a folder cannot be made at `path`, or renamed to it later; `source` as in `check_output`."""
    with os_errors_as_bad_input(path):
        if path.exists() and not path.is_dir():
            raise BadInput(f"{path} is a file; the output must be a folder")
        _check_replaceable(path, source)
        _check_writable(path)


def check_contents(path: Path, overwrite: bool, kind: Kind) -> None:
    """Raise BadInput if the folder `path` holds files, unless `overwrite` and they are a result of that `kind`."""
    with os_errors_as_bad_input(path):
        if not path.exists() or not any(path.iterdir()):
            return
        if not overwrite:
            raise BadInput(f"{path} is not empty; choose another output or pass --overwrite")
        if not (path / MARKS[kind]).exists():
            raise BadInput(f"{path} is not empty and holds no {kind}, so --overwrite will not clear it")


def _check_replaceable(path: Path, source: str) -> None:
    """Raise BadInput if the rename to `path`, after all the work, would fail or replace the wrong folder."""
    if path.is_symlink() or path.absolute().is_mount():
        raise BadInput(f"{path} is a link or a mount point, which cannot be replaced: name a new folder inside it")
    resolved = path.resolve()
    if source and Path(source).expanduser().is_dir() and Path(source).expanduser().resolve().is_relative_to(resolved):
        raise BadInput(f"{path} holds the model that is read, and would be replaced: choose another output")
    if Path.cwd().is_relative_to(resolved):
        raise BadInput(f"{path} is the folder you are in, which cannot be replaced: name a new folder inside it")


def _check_writable(path: Path) -> None:
    """Raise BadInput or OSError if folders with the longest names that are needed cannot be made beside `path`."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"cannot write to {parent}")
    if hasattr(os, "pathconf"):
        longest = os.pathconf(parent, "PC_NAME_MAX") - BESIDE
        for name in path.absolute().relative_to(parent).parts:
            if len(os.fsencode(name)) > longest:
                raise BadInput(f"{name[:40]}... is too long for the name of a folder: at most {longest} bytes")
        if len(os.fsencode(path.absolute())) > os.pathconf(parent, "PC_PATH_MAX") - INSIDE:
            raise BadInput(f"{str(path)[:40]}... is too long for a path")
    probe = beside(path, "part") if parent == path.absolute().parent else parent / f".{secrets.token_hex(8)}.part"
    probe.mkdir()
    probe.rmdir()


@contextmanager
def os_errors_as_bad_input(path: Path) -> Iterator[None]:
    """Turn the system's errors inside the block into BadInput, or DiskFull, with one line."""
    try:
        yield
    except BadInput:
        raise
    except OSError as error:
        if reason := disk_full(error):
            raise DiskFull(f"cannot write {path}: {reason}", reason) from error
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
    except ValueError as error:  # a name that the system's encoding cannot express
        raise BadInput(f"cannot write {path}: {error}") from error


def check_file(path: str | Path) -> Path:
    """Return the expanded path of a file to write. Raises BadInput if it cannot be written."""
    path = expanded(path)
    with os_errors_as_bad_input(path):
        if path.is_dir():
            raise BadInput(f"{path} is a folder; name a file")
        if not path.absolute().parent.is_dir():
            raise BadInput(f"there is no folder {path.parent}")
        new = not path.exists()
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    return path


def beside(path: Path, ending: str) -> Path:
    """Return a new name beside `path`: .NAME.HEX.ending."""
    return path.absolute().parent / f".{path.name}.{secrets.token_hex(4)}.{ending}"
