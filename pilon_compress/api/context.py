"""Read the models and texts that calls are given, and leave the process as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import PreTrainedModel

from pilon_compress.data.memory import Texts
from pilon_compress.io import progress
from pilon_compress.models.quiet import quiet_transformers

ModelLike: TypeAlias = str | Path | PreTrainedModel
"""A model: hub id, local folder, .gguf file, package:NAME, or an object of transformers."""

__all__ = ["ModelLike", "Texts", "calling", "device_of"]


@contextmanager
def calling(show_progress: bool = False) -> Iterator[None]:
    """A call of the library: progress on stderr only if asked for, transformers silent, random numbers put back."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with progress.visible(show_progress), quiet_transformers(), torch.random.fork_rng(devices):
        threads = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def device_of(model: ModelLike, asked: str) -> str:
    """The device to compute on: `asked`; with auto that of an object."""
    return str(model.device) if asked == "auto" and isinstance(model, PreTrainedModel) else asked
