"""End the process on SIGINT, SIGTERM and SIGHUP at a point where nothing is half done.

    the command line     listen()       outside guarded blocks the process cleans up, prints one line and ends
    renames of folders   guarded()      a signal waits for the end of the block
    the training loop    watched()      a signal only sets `request.code`; the loop saves and ends by itself

Handlers raise no exception, because Python drops exceptions inside a destructor or a callback. A second signal ends the
process at once. Exit codes: 128 + the signal's number.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminated: the terminal is gone"}
SIGNALS = tuple(getattr(signal, name) for name in WORDS if hasattr(signal, name))

_cleanups: list[Callable[[], None]] = []
_guards = 0
_waiting: int | None = None  # the signal that arrived in a guarded block
_ending = False


def listen() -> None:
    """End this process on SIGINT, SIGTERM and SIGHUP, after the registered cleanups; ignored signals stay ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a background job of a shell script
            signal.signal(number, _note)


def _note(number: int, _frame: FrameType | None) -> None:
    global _waiting
    if _ending or _waiting is not None:
        os._exit(128 + number)
    if _guards:
        _waiting = number
        return
    _end(number)


def _end(number: int) -> NoReturn:
    """Run the cleanups, innermost first, print one line, and exit without unwinding the stack."""
    global _ending
    _ending = True
    for cleanup in reversed(_cleanups):
        with suppress(Exception):
            cleanup()
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, f"{WORDS[signal.Signals(number).name]}\n".encode())
    os._exit(128 + number)


@contextmanager
def cleanup(action: Callable[[], None]) -> Iterator[None]:
    """Run `action` if a signal ends the process inside the block, where no `finally` would run."""
    _cleanups.append(action)
    try:
        yield
    finally:
        _cleanups.remove(action)


@contextmanager
def guarded() -> Iterator[None]:
    """Delay signals that arrive inside the block to its end."""
    global _guards, _waiting
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread only
        yield
        return
    _guards += 1
    try:
        yield
    finally:
        _guards -= 1
        if not _guards and _waiting is not None:
            number, _waiting = _waiting, None
            _end(number)


class EndRequest:
    """A signal's request to end. `code`: exit code, 0 until a signal arrives."""

    code = 0


@contextmanager
def watched() -> Iterator[EndRequest]:
    """Yield a request whose `code` the caller's loop checks to end by itself; a second signal ends the process."""
    request, before = EndRequest(), dict[Any, Any]()

    def note(number: int, _frame: FrameType | None) -> None:
        if request.code:
            _end(number)
        request.code = 128 + number

    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread, where the application handles signals
        pass
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
