"""Signals that ask for an end: noted by the handler, acted upon where nothing is half done; never an exception.

    the command line     listen()       outside a guarded stretch the process cleans up, says one line and ends
    renames of folders   guarded()      a signal waits until the stretch is over
    the training loop    watched()      a signal only sets `asked.code`; the loop saves and ends by itself

An exception that a handler raises can be lost: Python drops it inside a destructor or a callback. A second signal ends
the process at once. Exit codes: 128 + the signal's number.
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
_waiting: int | None = None  # the signal that came in a guarded stretch
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
    """Run the cleanups, innermost first, say one line, and leave without unwinding the stack."""
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
    """Run `action` if a signal ends the process within the block; elsewhere the block's own `finally` does it."""
    _cleanups.append(action)
    try:
        yield
    finally:
        _cleanups.remove(action)


@contextmanager
def guarded() -> Iterator[None]:
    """A stretch that must not be cut short: a signal that comes within it acts at its end."""
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


class Asked:
    """`code`: the exit code that a signal asks for, 0 until one has come."""

    code = 0


@contextmanager
def watched() -> Iterator[Asked]:
    """Let the caller's loop look at `asked.code` and end by itself; a second signal ends the process at once."""
    asked, before = Asked(), dict[Any, Any]()

    def note(number: int, _frame: FrameType | None) -> None:
        if asked.code:
            _end(number)
        asked.code = 128 + number

    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever runs us handles signals
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
