"""Read datasets of the hub row by row."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pilon_compress.data import columns
from pilon_compress.data.readers.registry import forms, source
from pilon_compress.errors import BadInput
from pilon_compress.io import hub

EXAMPLE = "hub:Salesforce/wikitext:wikitext-2-raw-v1:train:text"
END = object()


def tables(spec: str) -> dict[str, Iterator[Any]]:
    """Open hub:REPO:CONFIG:SPLIT as a table of rows. Raises BadInput for another number of fields."""
    fields = spec.split(":")
    if len(fields) != 4 or not all((fields[1], fields[3])):
        raise BadInput(f"{spec}: rows of a hub dataset are hub:REPO:CONFIG:SPLIT; CONFIG may be empty")
    return {spec: read(*fields[1:])}


def column(spec: str) -> tuple[str, str | None]:
    """Split hub:REPO:CONFIG:SPLIT[:COLUMN] into the table and the column, None where none is named."""
    fields = spec.split(":")
    return ":".join(fields[:4]), (fields[4] if len(fields) == 5 else None)


@source(
    "hub",
    form="hub:REPO:CONFIG:SPLIT:COLUMN",
    about="A dataset on the hub, streamed; CONFIG may be empty.",
    fingerprint=lambda spec: spec,
    tables=tables,
    column=column,
)
def documents(spec: str) -> Iterator[str]:
    """Yield the texts of a column of a dataset. Raises BadInput."""
    fields = spec.split(":")
    if len(fields) != 5 or not all((fields[1], fields[3], fields[4])):
        raise BadInput(f"{spec}: a hub dataset is hub:REPO:CONFIG:SPLIT:COLUMN, as in {EXAMPLE}")
    return columns.texts(read(*fields[1:4]), fields[4], spec)


def read(repo: str, config: str, split: str) -> Iterator[Any]:
    """Yield the rows of a split, streamed where the hub can be reached, else from the cache. Raises BadInput."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    offline = hub.unreachable() is not None
    try:
        with _reading():
            rows = iter(load_dataset(repo, config or None, split=split, streaming=not offline))
        while True:
            with _reading():  # not around the yield, so that the consumer of the rows keeps its own settings
                row = next(rows, END)
            if row is END:
                return
            yield row
    except (
        OSError,
        ValueError,
        RuntimeError,
        DatasetsError,
    ) as error:  # RuntimeError: it needs its own code
        if offline:
            reason = f"{repo} is not cached and the hub is out of reach ({hub.unreachable()})"
        else:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = f"hub:{repo}:{config}:{split} cannot be read: {lines[0]}"
        raise BadInput(f"{reason}; give another source: {forms(but='hub')}") from error


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
