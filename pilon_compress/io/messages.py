"""Messages of the library: log records below the logger "pilon_compress"; the command line writes them as lines.

logging.getLogger(__name__).info(...)    progress of the work; hidden unless the application configures logging
note(...)                                a warning about the input, once in a process
show(write)                              of the command line: every message is passed to `write` as it stands
"""

import logging
from collections.abc import Callable

ROOT = "pilon_compress"

_noted: set[str] = set()
_shown: "LineHandler | None" = None


class LineHandler(logging.Handler):
    """A handler that passes messages to `write`, without level or name; with `hold`, notes wait for `write_held`."""

    def __init__(self, write: Callable[[str], None], hold: bool) -> None:
        super().__init__(logging.INFO)
        self.put = write
        self.held: list[str] | None = [] if hold else None

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message of `record`, or hold it back."""
        message = record.getMessage()
        if self.held is not None and getattr(record, "note", False):
            self.held.append(message)
        else:
            self.put(message)

    def write_held(self) -> None:
        """Write the notes that were held back; later ones are written at once."""
        held, self.held = self.held or [], None
        for message in held:
            self.put(message)


def note(message: str) -> None:
    """Log a warning about the input, once in a process."""
    if message not in _noted:
        _noted.add(message)
        logging.getLogger(ROOT).warning(message, extra={"note": True})


def show(write: Callable[[str], None], hold: bool = False) -> LineHandler:
    """Pass every message to `write` from now on; with `hold`, notes wait for `release_notes`.

    A command that fails then prints its error alone.
    """
    global _shown
    logger = logging.getLogger(ROOT)
    if _shown is not None:
        logger.removeHandler(_shown)
    _shown = LineHandler(write, hold)
    logger.addHandler(_shown)
    logger.setLevel(logging.INFO)
    return _shown


def release_notes() -> None:
    """Write the notes that `show` holds back."""
    if _shown is not None:
        _shown.write_held()
