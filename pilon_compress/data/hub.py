"""Rows of a dataset on the hub."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pilon_compress.errors import BadInput
from pilon_compress.io import hub

ALTERNATIVES = "give a local txt, jsonl or parquet file, `stdlib`, or `stdin` instead"


def read(repo: str, config: str, split: str) -> Iterator[Any]:
    """Yield the rows of a split, streamed where the hub can be reached, else from the cache. Raises BadInput."""
    offline = hub.offline()
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        with _quiet():
            yield from load_dataset(repo, config or None, split=split, streaming=not offline)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it needs code of its own
        if offline:
            reason = f"{repo} is not cached and the hub is out of reach ({hub.unreachable()})"
        else:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = f"hub:{repo}:{config}:{split} cannot be read: {lines[0]}"
        raise BadInput(f"{reason}; {ALTERNATIVES}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `datasets` from logging an error that is then raised as BadInput, too."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
