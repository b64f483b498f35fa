"""Silence of transformers for the length of a call: the process keeps the log level and progress bars that it has."""

import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from pilon_compress.io.environment import default_environment


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers, within the block, from logging less than errors and from drawing progress bars.

    What matters of its warnings is refused by the callers in one line. It is also kept from asking a bot on the hub to
    open a pull request for a repository that has pickled weights only.
    """
    logging.get_verbosity()  # configures the logger where nothing has done so
    logger, bars = python_logging.getLogger("transformers"), logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    logging.disable_progress_bar()
    try:
        with default_environment(DISABLE_SAFETENSORS_CONVERSION="1"):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            logging.enable_progress_bar()
