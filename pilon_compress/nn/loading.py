"""Change models while transformers loads them, beyond what their config asks for, as long as a context lasts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from pilon_compress.nn.layout import Host


class Loading(Protocol):
    """Two changes of a model: before its weights are read, and after."""

    def before(self, model: Host) -> None:
        """Change the model, on the meta device, that has its PILON modules and no weights yet."""

    def after(self, model: Host, files: Sequence[Path]) -> None:
        """Change the model that was loaded from the safetensors `files`."""


LOADING: ContextVar[Loading | None] = ContextVar("LOADING", default=None)


@contextmanager
def loading_with(loading: Loading) -> Iterator[None]:
    """Let `loading` change PILON models that are loaded inside the context."""
    token = LOADING.set(loading)
    try:
        yield
    finally:
        LOADING.reset(token)
