"""Run commands in forks of this process, inject faults into them, and judge their leftovers."""

import builtins
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TIMED = {"report.json", "report.html", "README.md", "train.json", "train.html", "metrics.jsonl", "curves.png"}
TIMED |= {"manifest.json", "recipe.yaml"}  # files that differ between equal runs
SHORT = "--calibration ../text.txt --samples 16 --sequence-length 32 --batch-size 8 --eval-data none"
CONVERT = f"convert ../dense -o out --ffn-ratio 0.6 {SHORT}"
SMALL = "--sequence-length 32 --batch-size 4 --tokens 1024 --data ../text.txt --device cpu"
VERDICTS = ("same", "refused", "lost", "silent", "broken")


@dataclass
class Row:
    """A line of the table: a fault and a command, with the number of cases by verdict."""

    name: str
    command: str
    tried: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VERDICTS, 0))

    def add(self, verdict: str, detail: str) -> None:
        """Count a case; print the details of a fault."""
        self.tried += 1
        self.counts[verdict] += 1
        if verdict in ("lost", "silent", "broken"):
            print(f"  {verdict}: {self.name}: {detail}", file=sys.stderr)


@dataclass
class Ended:
    """A finished command; `code` is negative for a signal, None for one that had to be stopped."""

    code: int | None
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Return the lines of stderr that are not blank."""
        return [line for line in self.err.splitlines() if line.strip()]

    @property
    def broken(self) -> str | None:
        """Return why the end is a fault; None for exit 0, or exit 2 with an error line."""
        if self.code not in (0, 2) or "Traceback" in self.err:
            return f"exit {self.code}: {self.err[-300:]}"
        if self.code == 2 and not (self.lines and self.lines[-1].startswith("error: ")):
            return f"exit 2 without its line: {self.err[-300:]}"
        return None


class Place:
    """A folder with a tiny dense model, its text and a converted model; each case gets a folder inside it."""

    def __init__(self, root: Path, text: str) -> None:
        self.root, self.number = root, 0
        (root / "text.txt").write_text(text)

    def case(self, source: Path | None = None) -> Path:
        """Make the folder of the next case, empty or a copy of `source`."""
        self.number += 1
        folder = self.root / f"case{self.number}"
        shutil.copytree(source, folder, symlinks=True) if source is not None else folder.mkdir()
        return folder


def start(command: str, folder: Path, hook: Callable[[], None] = lambda: None) -> tuple[int, Path]:
    """Fork a child that runs `hook`, then the command in `folder`; return process id and folder of its streams."""
    streams = Path(tempfile.mkdtemp())
    child = os.fork()
    if child:
        return child, streams
    code = 70
    try:
        for number, name in enumerate(("in", "out", "err")):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(streams / name, flags), number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(folder)
        os.environ["PILON_CACHE"] = str(folder / "cache")
        sys.argv = ["pilon-compress", *command.split()]
        from pilon_compress.cli.main import main

        hook()
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def finish(child: int, streams: Path, limit: float = 60) -> Ended:
    """Wait for the child and return its end; kill it after `limit` seconds."""
    until, code = time.monotonic() + limit, None
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    out, err = ((streams / name).read_text(errors="replace") for name in ("out", "err"))
    shutil.rmtree(streams)
    return Ended(code, out, err)


def run(command: str, folder: Path, hook: Callable[[], None] = lambda: None, limit: float = 60) -> Ended:
    """Run a command in a fork, after `hook`, and return its end."""
    return finish(*start(command, folder, hook), limit)


def events(act: Callable[[int], None]) -> Callable[[], None]:
    """Return a hook that calls `act(n)` before the n-th change of the file system: renames, flushes, files opened."""

    def hook() -> None:
        count = 0

        def counted(function: Callable[..., object], counts: Callable[..., bool]) -> Callable[..., object]:
            def call(*words: object, **more: object) -> object:
                nonlocal count
                if counts(*words, **more):
                    count += 1
                    act(count)
                return function(*words, **more)

            return call

        for name in ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync"):
            setattr(os, name, counted(getattr(os, name), lambda *_, **__: True))

        def writes(_file: object, mode: object = "r", *_: object, **__: object) -> bool:
            return any(letter in str(mode) for letter in "wxa+")

        builtins.open = io.open = counted(io.open, writes)  # type: ignore[assignment]

    return hook


def killed_at(point: int) -> Callable[[], None]:
    """Return a hook that kills the process before the `point`-th change of the file system."""
    return events(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == point else None)


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of every file of an output, without checkpoints and files that hold times."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TIMED and "checkpoints" not in path.relative_to(folder).parts
    }


def leftovers(folder: Path) -> list[str]:
    """Return the names of unfinished work beside the output."""
    return sorted(path.name for path in folder.glob(".out*"))


def settle(
    row: Row, folder: Path, last: Ended, expected: list[dict[str, str]], detail: str, refusable: bool = False
) -> None:
    """Add the verdict on a case from its last command and its output, and delete its folder."""
    output = contents(folder / "out") if (folder / "out").is_dir() else {}
    if last.broken:
        row.add("broken", f"{detail}: {last.broken}")
    elif output in expected and not leftovers(folder):
        row.add("same", detail)
    elif refusable and last.code == 2:
        row.add("refused" if len(last.lines) == 1 else "broken", f"{detail}: {last.err[-300:]}")
    else:
        kind = "silent" if last.code == 0 and output not in expected else "lost"
        row.add(kind, f"{detail}: exit {last.code}, {sorted(output)[:3]} {leftovers(folder)} {last.err[-200:]}")
    shutil.rmtree(folder)
