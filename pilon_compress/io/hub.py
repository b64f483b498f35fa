"""Find out once, and quickly, if the model hub can be reached; its own client would retry for half a minute.

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
    """Return in a few words why the hub cannot be reached; None if it can."""
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
    """Yield True where the hub is out of reach; inside the block the client libraries then read their cache alone."""
    if unreachable() is None:
        yield False
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield True
    finally:
        constants.HF_HUB_OFFLINE = before
