"""The kernel library: compiled on first use into a cache, or beforehand for a wheel.

`python -m pilon_compress.kernels.build [FOLDER]` compiles it into FOLDER, by default beside this file, where `library`
finds it first. One file serves every CPU of an architecture: the instruction set is chosen when it is loaded.
"""

import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import torch
from filelock import FileLock

from pilon_compress.io.disk import atomic_file

log = logging.getLogger(__name__)
HOME = Path(__file__).parent
SOURCES = tuple(sorted(HOME.glob("*.cpp")) + sorted(HOME.glob("*.h")))
OLDEST_TORCH = (2, 10)  # the first whose stable ABI has all functions that the kernel calls
# -ffp-contract=off: a fused multiply-add would round differently from torch's float32 operations.
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w")


class KernelUnavailable(Exception):
    """Raised where the library cannot be compiled or written; the message is one line that says why."""


def library() -> Path:
    """Return the path of the library for this torch and machine; compiled if there is none. Raises KernelUnavailable.

    It is looked for beside this file and in `cache_folder()`. Processes that need it at once wait for the first.
    """
    name = f"products-{key()}.so"
    for folder in (HOME, cache_folder()):
        if (folder / name).is_file():
            return folder / name
    home = cache_folder()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{name}.lock"):
            if not (home / name).is_file():
                log.info("compiling the CPU kernels, once on this machine: half a minute")
                compile_to(home / name)
    except OSError as error:
        raise KernelUnavailable(
            f"cannot write {home}: {error.strerror or error}; set PILON_CACHE to a folder that can be written"
        ) from error
    return home / name


def key() -> str:
    """Return a hash of the sources, torch's version, the operating system, the architecture and the compiler flags."""
    digest = blake2b(digest_size=8)
    for part in (torch.__version__, sys.platform, platform.machine(), *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return $PILON_CACHE/kernels, or ~/.cache/pilon-compress/kernels where PILON_CACHE is not set."""
    named = os.environ.get("PILON_CACHE")
    return (Path(named).expanduser() if named else Path.home() / ".cache" / "pilon-compress") / "kernels"


def compile_to(path: Path) -> None:
    """Compile the library to `path`, which appears complete or not at all. Raises KernelUnavailable."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise KernelUnavailable(f"the kernel needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise KernelUnavailable("there is no C++ compiler (g++ or clang++) on this machine")
    with atomic_file(path) as built:
        _compile(compiler, built)


def _compile(compiler: str, built: Path) -> None:
    """Run the compiler, once more without OpenMP where that fails. Raises KernelUnavailable with its first error."""
    root = Path(torch.__file__).parent
    torch_flags = [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    target = f"-DTORCH_TARGET_VERSION=(((0ULL+{OLDEST_TORCH[0]})<<56)|((0ULL+{OLDEST_TORCH[1]})<<48))"
    for threads in (["-fopenmp"], []):  # a compiler without OpenMP still makes a kernel for one thread
        command = [*shlex.split(compiler), *FLAGS, *threads, target, str(HOME / "products.cpp"), "-o", str(built)]
        try:
            done = subprocess.run([*command, *torch_flags], capture_output=True, text=True)
        except OSError as error:
            raise KernelUnavailable(f"cannot run {compiler}: {error.strerror or error}") from error
        if done.returncode == 0:
            return
    errors = (
        [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    )
    raise KernelUnavailable(f"{compiler} failed: {errors[0]}")


if __name__ == "__main__":
    target_folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HOME
    target_folder.mkdir(parents=True, exist_ok=True)
    compile_to(target_folder / f"products-{key()}.so")
    print(target_folder / f"products-{key()}.so")
