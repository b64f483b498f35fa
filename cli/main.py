"""The `pilon-compress` command: its sub-commands, and what every failure looks like.

Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr says what to change), 130 interrupted, 143 terminated.
"""

import errno
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from pilon_compress import __version__, progress
from pilon_compress.errors import BadInput

from . import recipes
from .bench import bench
from .compare import compare
from .convert import convert
from .evaluate import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .train import train
from .usage import Command, application, usage_line

# What the libraries are told unless the user says otherwise: our own progress and messages are enough, and torch may
# have large pages for large tensors (on Linux; a sixth of the time of a calibration goes into small ones).
SETTINGS = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "THP_MEM_ALLOC_ENABLE": "1",
}

app = application(context_settings={"help_option_names": ["-h", "--help"]})
app.command("convert", cls=Command)(convert)
app.command("compare", cls=Command)(compare)
app.command("train", cls=Command)(train)
app.command("eval", cls=Command)(evaluate)
app.command("bench", cls=Command)(bench)
app.command("inspect", cls=Command)(inspect)
app.command("generate", cls=Command)(generate)
app.command("export", cls=Command)(export)
app.add_typer(recipes.app, name="recipes")


def _version(asked: bool) -> None:
    if asked:
        print(f"pilon-compress {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compress the feed-forward weights of transformers into shared low-rank primitives, and measure what is lost."""


def main() -> NoReturn:
    """Run the command line and leave with its exit code. PILON_DEBUG=1 lets exceptions through, tracebacks and all."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # half-written folders are removed on the way out
    progress.hold_notes()
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except SystemExit as leaving:  # typer turns Ctrl-C into exit code 130, without a word
        if leaving.code == 130:
            _leave(130, "interrupted")
        if leaving.code == 143:
            _leave(143, "terminated")
        if not leaving.code:
            progress.release_notes()
        raise
    except Exception as error:  # the outermost frame: whatever happened, the user gets one line and the right code
        if line := usage_line(error):
            _leave(2, line)
        if os.environ.get("PILON_DEBUG") == "1":
            raise
        if isinstance(error, BadInput):
            _leave(2, f"error: {error}")
        if _disk_is_full(error):
            _leave(2, f"error: no space left on the disk: {error}")
        _leave(1, f"failed: {type(error).__name__}: {error} (PILON_DEBUG=1 shows the traceback)")
    progress.release_notes()
    if code == 130:  # typer's word for Ctrl-C
        _leave(130, "interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _disk_is_full(error: Exception) -> bool:
    """Libraries written in other languages report it in words only."""
    number = error.errno if isinstance(error, OSError) else None
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _leave(code: int, message: str) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
