"""Environment variables that libraries read while they work, set for a stretch and put back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def default_environment(**variables: str) -> Iterator[None]:
    """Set those of `variables` that are not set, within the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
