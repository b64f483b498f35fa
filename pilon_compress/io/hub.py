"""Whether the model hub can be reached, found out once and quickly: its client would retry for half a minute.

A process keeps its environment and the settings of the client libraries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT = 10  # seconds


@cache
def unreachable() -> str | None:
    """Why the hub cannot be reached, in a few words; None if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    scheme = constants.ENDPOINT.partition(":")[0]
    if scheme not in ("http", "https"):
        return f"HF_ENDPOINT is {constants.ENDPOINT!r}"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT).close()
    except HTTPError:
        return None  # it answered
    except URLError as error:
        return getattr(error.reason, "strerror", None) or str(error.reason)
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


@contextmanager
def reaching() -> Iterator[bool]:
    """Yield True where only what is cached can be read; then the client libraries do not try either, in the block."""
    if unreachable() is None:
        yield False
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield True
    finally:
        constants.HF_HUB_OFFLINE = before
