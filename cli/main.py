"""The `pilon-compress` command: its sub-commands, and one line with an exit code for every failure.

Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr says what to change); 128 + the signal's number where a
signal ended it: 129 hang-up, 130 interrupted, 141 nobody reads the output any more, 143 terminated.
"""

import io
import os
import sys
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from pilon_compress import __version__
from pilon_compress.errors import BadInput
from pilon_compress.io import messages, progress, signals
from pilon_compress.io.disk import disk_full

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

# Environment of the libraries unless the user sets it: our own progress and messages are enough, and torch may
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


def _version(wanted: bool) -> None:
    """Print the version and leave, where `--version` is given."""
    if wanted:
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
    """Run the command line and exit with its code. PILON_DEBUG=1 lets exceptions through, with their tracebacks."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    progress.switch_on()
    messages.show(progress.say, hold=not progress.Stderr().isatty())
    signals.listen()
    sys.stderr = _Unfailing.around(sys.stderr)
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # typer ends with 1, without a word
            _unread()
        if leaving.code == 130:
            _leave(130, "interrupted")
        if leaving.code in (None, 0):
            messages.release_notes()
            _flush()
        raise
    except Exception as error:  # the outermost frame: whatever happened, the user gets one line and the right code
        if line := usage_line(error):
            _leave(2, line)
        if os.environ.get("PILON_DEBUG") == "1":
            raise
        if isinstance(error, BadInput):
            _leave(2, f"error: {error}")
        if isinstance(error, BrokenPipeError):
            _unread()
        if reason := disk_full(error):
            _leave(2, f"error: no space left on the disk: {reason}: {error}")
        _leave(1, f"failed: {type(error).__name__}: {error} (PILON_DEBUG=1 shows the traceback)")
    messages.release_notes()
    if code == 130:  # typer's word for Ctrl-C
        _leave(130, "interrupted")
    _flush()
    sys.exit(code if isinstance(code, int) else 0)


class _Unfailing(io.TextIOWrapper):
    """A stderr that cannot end the work: lines that cannot be written (a full disk, a closed pipe) are lost."""

    inner: Any

    @classmethod
    def around(cls, stream: Any) -> Any:
        """`stream` as an unfailing one, where it has a buffer; one that is closed or replaced stays as it is."""
        buffer = getattr(stream, "buffer", None)
        if buffer is None or isinstance(stream, cls):
            return stream
        found = cls(buffer, stream.encoding, "backslashreplace", line_buffering=True)
        found.inner = stream  # its end would close the buffer
        return found

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            super().flush()


def _flush() -> None:
    """Write out what is buffered; exit with an error if stdout does not take it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _unread()
    except OSError as error:
        _leave(2, f"error: cannot write the output: {error.strerror or error}")


def _unread() -> NoReturn:
    """Exit quietly, as a command whose output nobody reads any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(128 + 13)  # SIGPIPE


def _leave(code: int, message: str) -> NoReturn:
    """Write `message` as one line on stderr, behind what stdout still holds, and exit with `code`."""
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be written must not fail once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
