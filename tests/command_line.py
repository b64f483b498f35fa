"""`pilon-compress` and Python scripts as processes of their own: new interpreters, or forks of one that has torch.

A new interpreter takes five seconds for its imports and its end, a fork a tenth of one. The script at the bottom is
what is forked. It reads requests in JSON, one a line, and answers each with a number: a job with the pid of its fork,
`wait` and `poll` with the exit code of a fork, or null while it runs.
"""

import gc
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
ARCHITECTURES = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama"))
HEAVY = (  # what the command imports before its work begins
    "pilon_compress.convert.pipeline",
    "pilon_compress.compare.run",
    "pilon_compress.export.run",
    "pilon_compress.train.pipeline",
    "sklearn.cluster",
    *ARCHITECTURES,
)
BARE = ("torch", *ARCHITECTURES)  # what transformers imports to load a model, nothing of this package


def start(
    *words: object,
    cwd: Path | None = None,
    processes: int = 1,
    preexec_fn: Callable[[], None] | None = None,
    **environment: str,
) -> subprocess.Popen[str]:
    """Start it in a new interpreter with variables of its own, under torchrun where there are several `processes`."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", *(torchrun if processes > 1 else []), "pilon_compress.cli", *map(str, words)],
        cwd=cwd,
        env={**os.environ, **SURROUNDINGS, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def finish(process: subprocess.Popen[str], code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Wait for its end; `code` is what it must end with, None for any."""
    out, err = process.communicate()
    assert code is None or process.returncode == code, err + out
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Forks:
    """`forks(*words, cwd=folder)` runs the command in a fork of an interpreter that has imported `modules`.

    A fork has this process's environment as it was when these forks were made, and the `environment` of the call.
    """

    def __init__(self, modules: tuple[str, ...] = HEAVY) -> None:
        self.home = tempfile.TemporaryDirectory()
        self.count = 0
        self.parent = subprocess.Popen(
            [sys.executable, __file__, *modules],
            env={**os.environ, **SURROUNDINGS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *words: object, cwd: Path | None = None, code: int | None = 0, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """`code` as in `Fork.end`; `more` as in `start`."""
        return self.start(*words, cwd=cwd, **more).end(code)

    def python(
        self, text: str, *words: object, cwd: Path | None = None, code: int | None = 0, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `text` as a script with `words` as its arguments."""
        return self.start(*words, cwd=cwd, text=text, **more).end(code)

    def start(
        self,
        *words: object,
        cwd: Path | None = None,
        stdin: str = "",
        file_limit: int | None = None,
        text: str | None = None,
        **environment: str,
    ) -> "Fork":
        """Start the command, or a script of that `text`. `file_limit`: bytes that any file it writes may have, as on a
        full disk."""
        self.count += 1
        files = {stream: f"{self.home.name}/{self.count}.{stream}" for stream in ("stdin", "stdout", "stderr")}
        Path(files["stdin"]).write_text(stdin)
        job = {"words": list(map(str, words)), "folder": str(cwd or Path.cwd()), "file_limit": file_limit, "text": text}
        return Fork(self, self.ask({**job, "environment": environment, **files}), files)

    def together(
        self, *words: object, processes: int, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command in several processes with the variables that torchrun sets; return the first one's output."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), **environment}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        started = [self.start(*words, cwd=cwd, **group, **rank) for rank in ranks]
        return [one.end() for one in started][0]

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.parent.stdin is not None and self.parent.stdout is not None
        print(json.dumps(request), file=self.parent.stdin, flush=True)
        return json.loads(self.parent.stdout.readline())

    def end(self) -> None:
        self.parent.kill()
        self.parent.communicate()
        self.home.cleanup()


class Fork:
    """A process that `Forks.start` has started."""

    def __init__(self, forks: Forks, pid: int, files: dict[str, str]) -> None:
        self.forks, self.pid, self.files = forks, pid, files

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        code = self.forks.ask({"poll": self.pid})
        return None if code is None else int(code)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Wait for its end; `code` is what it must end with, None for any."""
        ended = int(self.forks.ask({"wait": self.pid}))
        out, err = (Path(self.files[stream]).read_text() for stream in ("stdout", "stderr"))
        for path in self.files.values():
            Path(path).unlink()
        assert code is None or ended == code, err + out
        return subprocess.CompletedProcess(str(self.pid), ended, out, err)


def become(job: dict[str, Any]) -> None:
    """The forked process turns into the command, or into the script."""
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if stream == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(job[stream], flags), number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    if job["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    code = 70
    try:
        if job["text"] is None:
            sys.argv = ["pilon-compress", *job["words"]]
            import_module("pilon_compress.cli.main").main()
        else:
            sys.argv = ["-c", *job["words"]]
            sys.path.insert(0, "")
            exec(compile(job["text"], "<string>", "exec"), {"__name__": "__main__"})
            code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:  # at once: taking everything apart takes a second
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def serve(modules: list[str]) -> None:
    if any(name.startswith("pilon_compress.") for name in modules):
        for name, value in import_module("pilon_compress.cli.main").SETTINGS.items():
            os.environ.setdefault(name, value)
    for name in modules:
        import_module(name)
    gc.freeze()  # no collection in a fork touches, hence copies, what it shares with this process
    codes: dict[int, int] = {}
    while line := sys.stdin.readline():
        request = json.loads(line)
        pid = request.get("wait") or request.get("poll")
        if pid is None:
            answer: int | None = os.fork()
            if answer == 0:
                become(request)
        else:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG if "poll" in request else 0))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
            answer = codes.get(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
