"""Lock, fill and replace the output folder of a command.

    .NAME.lock         locked while a command writes NAME; contains its process id
    .NAME.HEX.part     the new folder, until it is complete and renamed to NAME
    .NAME.HEX.old      the replaced folder, until the new one is NAME
    .NAME.partial      the journal of unfinished work (io.journal)

A process may be killed between any two of these steps; the next command with that output restores order.
"""

import glob
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pilon_compress.errors import BadInput
from pilon_compress.io import manifest, signals
from pilon_compress.io.checksum import MANIFEST
from pilon_compress.io.disk import DiskFull, atomic_folder, disk_full, read_bounded, rename
from pilon_compress.io.output_paths import (
    MARKS,
    Kind,
    beside,
    check_contents,
    check_place,
    expanded,
    os_errors_as_bad_input,
)

HEX = "[0-9a-f]" * 8
NONCE = "nonce"  # file of a journal; the manifest of the finished output repeats it as `journal`

_held: dict[str, int] = {}  # outputs that this process has locked -> thread


def partial_folder(output: Path) -> Path:
    """Return the folder of unfinished work for `output`, beside it."""
    return output.absolute().parent / f".{output.name}.partial"


@contextmanager
def open_output(
    path: str | Path, overwrite: bool = False, source: str = "", kind: Kind = "model", resume: bool = False
) -> Iterator[Path]:
    """Lock the output `path` inside the block, remove leftovers of a killed process, and yield the expanded path.

    `resume` skips the checks of `check_output`. A process that has locked an output may open it again. Raises BadInput
    where `check_output` does, and where another process writes the output.
    """
    path = expanded(path)
    if not resume:
        check_place(path, source)
    made = [parent for parent in path.absolute().parents if not parent.exists()]  # innermost first

    def leave() -> None:
        for parent in () if path.exists() or partial_folder(path).exists() else made:
            with suppress(OSError):
                parent.rmdir()

    with os_errors_as_bad_input(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with signals.cleanup(leave):
        try:
            with _locked(path):
                with os_errors_as_bad_input(path):
                    _recover(path)
                if not resume:
                    check_contents(path, overwrite, kind)
                yield path
        finally:
            leave()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock `.NAME.lock` inside the block. Raises BadInput at once if another process or thread has locked it."""
    file = path.absolute().parent / f".{path.name}.lock"
    if not os.access(file.parent, os.W_OK) and os.access(path, os.W_OK):  # the output is a mounted volume
        file = path / ".lock"
    key, thread = os.path.realpath(file), threading.get_ident()
    if _held.get(key) == thread:
        yield
        return
    lock = FileLock(file)
    with os_errors_as_bad_input(path):
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
            # before the release, so that a process that has opened the file finds it unlinked and tries again
            file.unlink()
        lock.release()


def _leftovers(path: Path, ending: str) -> list[Path]:
    return sorted(
        path.absolute().parent.glob(f".{glob.escape(path.name)}.{HEX}.{ending}"), key=lambda p: p.stat().st_mtime
    )


def _unfinished(path: Path) -> bool:
    """Return True if a process was killed between the two renames of a replacement."""
    return not path.exists() and bool(_leftovers(path, "old"))


def _recover(path: Path) -> None:
    """Clean up after a killed process: rename the old folder back, delete unfinished ones and finished journals."""
    if _unfinished(path):
        rename(_leftovers(path, "old")[-1], path)
    discard_old(path)
    for leftover in _leftovers(path, "part"):
        shutil.rmtree(leftover, ignore_errors=True)
    nonce = journal_of(path)
    for name in (MANIFEST, MARKS["comparison"]) if nonce is not None else ():
        if (path / name).is_file():
            with suppress(BadInput):
                # equal: the journal belongs to the finished output
                if manifest.read_ours(path / name).get("journal") == nonce:
                    discard_journal(path)


def discard_journal(path: Path) -> None:
    """Delete the journal of unfinished work for `path`; a rename first, because the process may be killed."""
    folder = partial_folder(path)
    if folder.exists():
        with suppress(OSError):
            folder = folder.rename(beside(path, "part"))  # the next command deletes folders of this name
    shutil.rmtree(folder, ignore_errors=True)


def journal_of(path: Path) -> str | None:
    """Return the nonce of the journal of unfinished work for `path`; None where there is none."""
    with suppress(OSError, ValueError):
        return read_bounded(partial_folder(path) / NONCE, 1 << 10)
    return None


@contextmanager
def fresh_folder(path: str | Path, overwrite: bool = False, kind: Kind = "model") -> Iterator[Path]:
    """Yield a temporary folder beside `path`: flushed and renamed to `path` when the block succeeds, else deleted.

    A model gets a manifest. Raises BadInput like `open_output`, and DiskFull.
    """
    with open_output(path, overwrite, kind=kind) as path:
        nonce = journal_of(path)

        def describe(work: Path) -> None:
            if (work / MARKS["model"]).exists():
                manifest.write(work, journal=nonce)

        try:
            with atomic_folder(path, describe, beside(path, "part")) as work:
                yield work
        except Exception as error:
            if isinstance(error, BadInput):
                raise
            if reason := disk_full(error):
                raise DiskFull(f"cannot write {path}: {reason}; nothing was kept", reason) from error
            raise


def set_aside(path: Path) -> None:
    """Rename the folder `path`, which is made again, until `put_back` or `discard_old`."""
    rename(path, beside(path, "old"))


def put_back(path: Path) -> None:
    """Delete `path`, and rename the folder that was set aside back to it."""
    shutil.rmtree(path, ignore_errors=True)
    if leftovers := _leftovers(path, "old"):
        rename(leftovers[-1], path)


def discard_old(path: Path) -> None:
    """Delete the folders that were set aside for `path`."""
    for leftover in _leftovers(path, "old"):
        shutil.rmtree(leftover, ignore_errors=True)
