"""Set environment variables that libraries read, for the duration of a block."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def default_environment(**variables: str) -> Iterator[None]:
    """Set the `variables` that are not set yet, inside the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
