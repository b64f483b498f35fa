"""Output folders: one way to name, check, lock, fill and replace the folder that a command writes.

    .NAME.lock         held while a command writes NAME; holds the number of its process
    .NAME.HEX.part     the new folder, until it is whole and takes its name
    .NAME.HEX.old      the folder that is replaced, until the new one has its name
    .NAME.partial      the journal of unfinished work (convert.journal)

A process may be killed between any two of these steps: the next command with that output puts things right.
"""

import glob
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from pilon_compress.errors import BadInput
from pilon_compress.io import manifest, signals
from pilon_compress.io.checksum import MANIFEST
from pilon_compress.io.disk import DiskFull, disk_full, read_bounded, rename, whole_folder

Kind = Literal["model", "comparison"]
MARKS: dict[Kind, str] = {"model": "config.json", "comparison": "compare.json"}  # by which --overwrite knows its like
HEX = "[0-9a-f]" * 8
BESIDE = len(f"..{'0' * 8}.part")  # bytes that the longest name beside an output adds to its own
INSIDE = 128  # bytes of the longest path below an output
NONCE = "nonce"  # of a journal; the output that it became has it too, as `journal`

_held: dict[str, int] = {}  # outputs that this process has locked -> thread


def expanded(path: str | Path) -> Path:
    """`path` with `~` expanded and without `..`. Raises BadInput for names that no folder can have."""
    text = os.fspath(path)
    if "\0" in text or not text:
        raise BadInput(f"{text!r} is no name for an output")
    try:
        text.encode()
        found = Path(text).expanduser()
    except UnicodeEncodeError:
        raise BadInput(f"{text!r} is no name for an output: it is not valid UTF-8") from None
    except RuntimeError:
        raise BadInput(f"{text}: there is no such user, hence no home folder") from None
    return found.resolve() if ".." in found.parts else found


def check_output(path: str | Path, overwrite: bool, source: str = "", kind: Kind = "model") -> Path:
    """The expanded `path`. Raises BadInput if it cannot become a fresh folder of that `kind`.

    With `overwrite` only a folder that holds a result of that kind is given up: a slip must not clear somebody's home.
    Never given up: `source`, the model that is being read, and the folder that the user stands in.
    """
    path = expanded(path)
    _check_place(path, source)
    _check_contents(path, overwrite, kind)
    return path


def _check_place(path: Path, source: str) -> None:
    with _refusing(path):
        if path.exists() and not path.is_dir():
            raise BadInput(f"{path} is a file; the output must be a folder")
        _check_replaceable(path, source)
        _check_writable(path)


def _check_contents(path: Path, overwrite: bool, kind: Kind) -> None:
    with _refusing(path):
        if not path.exists() or not any(path.iterdir()):
            return
        if not overwrite:
            raise BadInput(f"{path} is not empty; choose another output or pass --overwrite")
        if not (path / MARKS[kind]).exists():
            raise BadInput(f"{path} is not empty and holds no {kind}, so --overwrite will not clear it")


def _check_replaceable(path: Path, source: str) -> None:
    """A finished folder takes its name by a rename, which must not fail after all the work is done."""
    if path.is_symlink() or path.absolute().is_mount():
        raise BadInput(f"{path} is a link or a mount point, which cannot be replaced: name a new folder inside it")
    whole = path.resolve()
    if source and Path(source).expanduser().is_dir() and Path(source).expanduser().resolve().is_relative_to(whole):
        raise BadInput(f"{path} holds the model that is read, and would be replaced: choose another output")
    if Path.cwd().is_relative_to(whole):
        raise BadInput(f"{path} is the folder you are in, which cannot be replaced: name a new folder inside it")


def _check_writable(path: Path) -> None:
    """Try what will be needed: a folder beside `path`, of a name as long as any that will be made there."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"cannot write to {parent}")
    if hasattr(os, "pathconf"):
        longest = os.pathconf(parent, "PC_NAME_MAX") - BESIDE
        for name in path.absolute().relative_to(parent).parts:
            if len(os.fsencode(name)) > longest:
                raise BadInput(f"{name[:40]}... is too long a name for a folder: at most {longest} bytes")
        if len(os.fsencode(path.absolute())) > os.pathconf(parent, "PC_PATH_MAX") - INSIDE:
            raise BadInput(f"{str(path)[:40]}... is too long a path")
    probe = _beside(path, "part") if parent == path.absolute().parent else parent / f".{secrets.token_hex(8)}.part"
    probe.mkdir()
    probe.rmdir()


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn the system's refusals into one line."""
    try:
        yield
    except BadInput:
        raise
    except OSError as error:
        if reason := disk_full(error):
            raise DiskFull(f"cannot write {path}: {reason}", reason) from error
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
    except ValueError as error:  # a name that the system's encoding does not have
        raise BadInput(f"cannot write {path}: {error}") from error


def check_file(path: str | Path) -> Path:
    """The expanded path of a single file that is to be written. Raises BadInput where it cannot be."""
    path = expanded(path)
    with _refusing(path):
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


def partial_folder(output: Path) -> Path:
    """Where unfinished work for `output` is kept: beside it."""
    return output.absolute().parent / f".{output.name}.partial"


def _beside(path: Path, ending: str) -> Path:
    return path.absolute().parent / f".{path.name}.{secrets.token_hex(4)}.{ending}"


@contextmanager
def open_output(
    path: str | Path, overwrite: bool = False, source: str = "", kind: Kind = "model", resume: bool = False
) -> Iterator[Path]:
    """Hold the output `path`, expanded, for this process, as `check_output` allows; what a killed one left goes.

    `resume`: the folder may be and hold anything, its owner decides. Raises BadInput where another process writes it.
    A process that holds an output may open it again.
    """
    path = expanded(path)
    if not resume:
        _check_place(path, source)
    made = [parent for parent in path.absolute().parents if not parent.exists()]  # innermost first

    def leave() -> None:
        for parent in () if path.exists() or partial_folder(path).exists() else made:
            with suppress(OSError):
                parent.rmdir()

    with _refusing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with signals.cleanup(leave):
        try:
            with _locked(path):
                with _refusing(path):
                    _recover(path)
                if not resume:
                    _check_contents(path, overwrite, kind)
                yield path
        finally:
            leave()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `.NAME.lock`. Raises BadInput at once where another process, or thread, does."""
    file = path.absolute().parent / f".{path.name}.lock"
    if not os.access(file.parent, os.W_OK) and os.access(path, os.W_OK):  # a mounted volume that a run goes on in
        file = path / ".lock"
    key, thread = os.path.realpath(file), threading.get_ident()
    if _held.get(key) == thread:
        yield
        return
    lock = FileLock(file)
    with _refusing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too
            holder = ""
            with suppress(OSError, ValueError):
                holder = f" (process {int(read_bounded(file, 20))})"
            raise BadInput(f"{path} is being written by another pilon-compress{holder}") from None
        file.write_text(str(os.getpid()))
    _held[key] = thread
    try:
        with signals.cleanup(lambda: file.unlink(missing_ok=True)):
            yield
    finally:
        del _held[key]
        with suppress(OSError):
            file.unlink()  # before the release: whoever opened it meanwhile sees that it has no name, and tries again
        lock.release()


def _left(path: Path, ending: str) -> list[Path]:
    return sorted(
        path.absolute().parent.glob(f".{glob.escape(path.name)}.{HEX}.{ending}"), key=lambda p: p.stat().st_mtime
    )


def _unfinished(path: Path) -> bool:
    """True if a process was killed between the two renames of a replacement."""
    return not path.exists() and bool(_left(path, "old"))


def _recover(path: Path) -> None:
    """Put right what a killed process left: the old folder back under its name, unfinished ones gone."""
    if _unfinished(path):
        rename(_left(path, "old")[-1], path)
    discard_old(path)
    for left in _left(path, "part"):
        shutil.rmtree(left, ignore_errors=True)
    nonce = journal_of(path)
    for name in (MANIFEST, MARKS["comparison"]) if nonce is not None else ():
        if (path / name).is_file():
            with suppress(BadInput):
                if manifest.read_ours(path / name).get("journal") == nonce:  # of the work that this output came from
                    discard_journal(path)


def discard_journal(path: Path) -> None:
    """Delete the journal of unfinished work for `path`, out of sight at once: a process may be killed meanwhile."""
    folder = partial_folder(path)
    if folder.exists():
        with suppress(OSError):
            folder = folder.rename(_beside(path, "part"))  # which the next command clears
    shutil.rmtree(folder, ignore_errors=True)


def journal_of(path: Path) -> str | None:
    """The nonce of the journal of unfinished work for `path`; None where there is none."""
    with suppress(OSError, ValueError):
        return read_bounded(partial_folder(path) / NONCE, 1 << 10)
    return None


@contextmanager
def fresh_folder(path: str | Path, overwrite: bool = False, kind: Kind = "model") -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well and vanishes when it does not.

    A model gets a manifest. All is on the disk before the folder takes its name. Raises BadInput as
    `open_output` does, and DiskFull.
    """

    with open_output(path, overwrite, kind=kind) as path:
        nonce = journal_of(path)

        def describe(work: Path) -> None:
            if (work / MARKS["model"]).exists():
                manifest.write(work, journal=nonce)

        try:
            with whole_folder(path, describe, _beside(path, "part")) as work:
                yield work
        except Exception as error:
            if isinstance(error, BadInput):
                raise
            if reason := disk_full(error):
                raise DiskFull(f"cannot write {path}: {reason}; nothing was kept", reason) from error
            raise


def set_aside(path: Path) -> None:
    """Rename the folder `path`, which is made anew, until `put_back` or `discard_old`."""
    rename(path, _beside(path, "old"))


def put_back(path: Path) -> None:
    """Delete `path`; what was set aside has its name again."""
    shutil.rmtree(path, ignore_errors=True)
    if left := _left(path, "old"):
        rename(left[-1], path)


def discard_old(path: Path) -> None:
    """Delete what was set aside for `path`."""
    for left in _left(path, "old"):
        shutil.rmtree(left, ignore_errors=True)
