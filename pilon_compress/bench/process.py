"""A process that holds a model and answers requests: see `answering`."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from pilon_compress.errors import BadInput

PATIENCE = 10.0  # seconds that a process has to end


class Process:
    """A module of this room as a new Python process, ended when the block ends."""

    def __init__(self, module: str, arguments: Sequence[str | int | Path]) -> None:
        self.module = module
        command = [sys.executable, "-m", f"pilon_compress.bench.{module}", *map(str, arguments)]
        self.log = TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process
        self.begun = time.perf_counter()
        self.running = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, encoding="utf-8"
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request. Raises BadInput for a refusal, RuntimeError if the process has ended."""
        assert self.running.stdin is not None and self.running.stdout is not None
        with suppress(OSError):  # it has ended; its last line says why
            print(json.dumps(request), file=self.running.stdin, flush=True)
        line = self.running.stdout.readline()
        if not line:
            self.log.seek(0)
            said = [one for one in self.log.read().splitlines() if one.strip()]
            raise RuntimeError(f"{self.module} ended: {said[-1] if said else 'without a word'}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise BadInput(answer["refused"])
        return answer

    def age(self) -> float:
        """Return the seconds since the process was started."""
        return time.perf_counter() - self.begun

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.running.stdin is not None and self.running.stdout is not None
        try:
            self.running.stdin.close()
            self.running.wait(PATIENCE if kind is None else 0)
        except (OSError, subprocess.TimeoutExpired):
            self.running.kill()
            self.running.wait()
        self.running.stdout.close()
        self.log.close()
