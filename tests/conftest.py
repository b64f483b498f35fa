"""Fixtures for every test; in importlib mode tests cannot import each other, so shared builders are handed out here.

`tiny`: tests/tiny.py, tiny models and a tokenizer. `cli`: the command line, tests/command_line.py. `hub`: a model hub
on this machine, tests/tiny_hub.py.
"""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell, as all its children would be
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests start subprocesses; forking would make it complain
os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is imported, by whichever test comes first
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # tests run side by side: threads of several processes would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

PROCESSES = {"bare", "cli", "command_line", "hub"}  # fixtures that start processes
LONG = {  # files of ten CPU seconds or so: they train, compile, convert whole models or interpret GPU kernels
    "test_benchmarks",
    "test_causal_road",
    "test_compare",
    "test_examples",
    "test_extending",
    "test_gguf",
    "test_integers",
    "test_kernels_compiled",
    "test_kernels_gpu",
    "test_packaging",
    "test_packed",
    "test_readme",
    "test_refine",
    "test_resume",
    "test_ternarise",
    "test_train",
    "test_train_distributed",
    "test_train_encoder",
    "test_train_exits",
    "test_train_heal",
    "test_train_heal_distributed",
    "test_train_selection_road",
    "test_train_sft",
    "test_train_shrink",
    "test_train_staged",
    "test_train_teacher",
    "test_train_ternary",
    "test_train_warm",
    "test_types",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `long` what `make test-fast` leaves out."""
    for item in items:
        if PROCESSES & set(getattr(item, "fixturenames", ())) or item.path.stem in LONG:
            item.add_marker("long")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny.py: tiny_tokenizer(), tiny_model(family), save_tiny(family, folder)."""
    return _load("tiny")


@pytest.fixture(scope="session")
def command_line() -> ModuleType:
    """tests/command_line.py: `start(*words)` and `finish(process)`, the command in a new interpreter."""
    return _load("command_line")


@pytest.fixture(scope="session")
def cli(command_line: ModuleType) -> Iterator[Any]:
    """`cli(*words, cwd=folder)` runs `pilon-compress` as a process of its own, without the wait for its imports."""
    forks = command_line.Forks()
    yield forks
    forks.end()


@pytest.fixture(scope="session")
def bare(command_line: ModuleType) -> Iterator[Any]:
    """`bare.python(text)` runs a script in a process that has torch and transformers, and nothing of this package."""
    forks = command_line.Forks(command_line.BARE)
    yield forks
    forks.end()


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`with stop_after(steps):` a training in this process is asked to end, as by Ctrl-C, and raises `loop.Stopped`."""
    from pilon_compress.optimize import loop

    @contextmanager
    def stopping(steps: int) -> Iterator[None]:
        taken, plain = [], loop._step

        def step(job: Any, share: float) -> Any:
            taken.append(share)
            if len(taken) == steps:
                os.kill(os.getpid(), signal.SIGINT)
            return plain(job, share)

        with monkeypatch.context() as patch, pytest.raises(loop.Stopped):
            patch.setattr(loop, "_step", step)
            yield

    return stopping


@pytest.fixture(scope="session")  # before any fixture that would use triton
def triton() -> None:
    """For tests of the Triton kernels. On Linux they all run: its absence is a failure. Elsewhere there is no triton to
    install, hence none among the packages of `dev`."""
    if sys.platform != "linux":
        pytest.skip("triton has no builds for this system")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`said()` returns the messages since the last call, as lines of the command line."""
    from pilon_compress.io import messages

    lines: list[str] = []

    def taken() -> list[str]:
        found = list(lines)
        lines.clear()
        return found

    monkeypatch.setattr(messages, "_noted", set())
    monkeypatch.setattr(messages, "_shown", None)
    handler = messages.show(lines.append)
    yield taken
    logging.getLogger(messages.ROOT).removeHandler(handler)


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    """An empty hub: fill `hub.root`; `hub.run(*arguments, **environment)` runs Python with it and an empty cache."""
    server = _load("tiny_hub").Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    surroundings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **surroundings, **environment},
            capture_output=True,
            text=True,
            check=True,
        )

    server.run = run
    yield server
    server.shutdown()
    server.server_close()
