"""The companion files of a model, by its reference: see `io.companions`."""

import logging
from collections.abc import Mapping
from pathlib import Path

from pilon_compress.data.memory import in_memory
from pilon_compress.errors import BadInput
from pilon_compress.io import companions
from pilon_compress.models.in_memory import held_model, record_of
from pilon_compress.models.references import resolve

log = logging.getLogger(__name__)


def companions_of(reference: str, quiet: bool = False) -> dict[str, Path]:
    """Return the companion files of a model: relative name -> file. Raises BadInput for what must not be copied.

    Of a model in memory they are those of its record, or of the place that it was loaded from, where that can be read.
    """
    model = held_model(reference)
    if model is None:
        return companions.find(resolve(reference), quiet=quiet)
    kept: Mapping[str, Path] = record_of(model).companions
    if kept or in_memory(reference):
        return {name: path for name, path in kept.items() if path.is_file()}
    try:
        return companions.find(reference, quiet=quiet)
    except BadInput as reason:
        log.info("no files beside the weights are taken along: %s", reason)
        return {}
