"""Rows of a dataset on the hub."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pilon_compress.errors import BadInput
from pilon_compress.io import hub

ALTERNATIVES = "give a local txt, jsonl or parquet file, `stdlib`, or `stdin` instead"
END = object()


def read(repo: str, config: str, split: str) -> Iterator[Any]:
    """Yield the rows of a split, streamed where the hub can be reached, else from the cache. Raises BadInput."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    offline = hub.unreachable() is not None
    try:
        with _reading():
            rows = iter(load_dataset(repo, config or None, split=split, streaming=not offline))
        while True:
            with _reading():  # not around the yield: whoever takes the rows keeps its own settings
                row = next(rows, END)
            if row is END:
                return
            yield row
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it needs code of its own
        if offline:
            reason = f"{repo} is not cached and the hub is out of reach ({hub.unreachable()})"
        else:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = f"hub:{repo}:{config}:{split} cannot be read: {lines[0]}"
        raise BadInput(f"{reason}; {ALTERNATIVES}") from error


@contextmanager
def _reading() -> Iterator[None]:
    """Keep `datasets` from trying a hub that is out of reach, and from logging an error that is raised as BadInput."""
    import datasets

    logger, settings = logging.getLogger("datasets"), datasets.config
    level, before = logger.level, settings.HF_HUB_OFFLINE
    logger.setLevel(logging.CRITICAL)
    try:
        with hub.reaching() as offline:
            settings.HF_HUB_OFFLINE = before or offline
            yield
    finally:
        logger.setLevel(level)
        settings.HF_HUB_OFFLINE = before
