"""`pilon-compress` as a process of its own: in a new interpreter, or in a fork of one that has torch already.

A new interpreter takes five seconds for its imports and its end, a fork a tenth of one. The script at the bottom is
what is forked. Its standard input: a job in JSON a line, `words`, `folder` and the files `stdin`, `stdout`, `stderr`;
its standard output: each one's exit code.
"""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SURROUNDINGS = {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
HEAVY = (
    "pilon_compress.convert.pipeline",
    "pilon_compress.compare.run",
    "pilon_compress.export.run",
    "pilon_compress.train.pipeline",
    "sklearn.cluster",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)


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
    """`forks(*words, cwd=folder)` runs it in a fork, whose environment is this one's as it was at the start."""

    def __init__(self) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **SURROUNDINGS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self,
        *words: object,
        cwd: Path | None = None,
        code: int | None = 0,
        stdin: str = "",
        file_limit: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """`code` as in `finish`; `file_limit`: bytes that any file it writes may have, as on a full disk."""
        assert self.parent.stdin is not None and self.parent.stdout is not None
        with tempfile.TemporaryDirectory() as name:
            files = {stream: f"{name}/{stream}" for stream in ("stdin", "stdout", "stderr")}
            Path(files["stdin"]).write_text(stdin)
            job = {"words": list(map(str, words)), "folder": str(cwd or Path.cwd()), "file_limit": file_limit, **files}
            print(json.dumps(job), file=self.parent.stdin, flush=True)
            ended = int(self.parent.stdout.readline())
            out, err = (Path(files[stream]).read_text() for stream in ("stdout", "stderr"))
        assert code is None or ended == code, err + out
        return subprocess.CompletedProcess(job["words"], ended, out, err)

    def end(self) -> None:
        self.parent.kill()
        self.parent.communicate()


def become(job: dict) -> None:
    """The forked process turns into the command."""
    from pilon_compress.cli.main import main

    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if stream == "stdin" else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(job[stream], flags), number)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    if job["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    os.chdir(job["folder"])
    sys.argv = ["pilon-compress", *job["words"]]
    code = 70
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    finally:  # at once: taking everything apart takes a second
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    from importlib import import_module

    from pilon_compress.cli.main import SETTINGS

    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in HEAVY:
        import_module(name)
    gc.freeze()  # no collection in a fork touches, hence copies, what it shares with this process
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
