"""Texts that a Python program hands over as strings: a source whose name holds only inside the call that reads it.

with hold(["one text", "another"]) as spec:      spec is memory:2-texts-5c1f3a90
    open_text(spec)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import TypeAlias

from pilon_compress.data.readers.registry import Source
from pilon_compress.errors import BadInput

SCHEME = "memory"
Texts: TypeAlias = str | Sequence[str]
"""A text source by name, or texts."""

_held: ContextVar[dict[str, list[str]]] = ContextVar("texts held in memory", default={})  # noqa: B039 (never changed)


@contextmanager
def hold(texts: Texts | None) -> Iterator[str | None]:
    """Yield the name of a source of `texts` inside the context; a source that has a name already keeps it, or None.

    Equal texts have equal names. Raises BadInput for what is no list of strings.
    """
    if texts is None or isinstance(texts, str):
        yield texts
        return
    documents = list(texts)
    wrong = next((one for one in documents if not isinstance(one, str)), None)
    if not documents or wrong is not None:
        found = "no text" if not documents else f"a {type(wrong).__name__}"
        raise BadInput(f"texts must be a source by name, or a list of strings; this one holds {found}")
    state = blake2b(digest_size=4)
    for document in documents:
        state.update(document.encode("utf-8", "surrogatepass") + b"\0")
    name = f"{SCHEME}:{len(documents)}-texts-{state.hexdigest()}"
    token = _held.set({**_held.get(), name: documents})
    try:
        yield name
    finally:
        _held.reset(token)


def in_memory(spec: str) -> bool:
    """Return True for the name of texts, or of a model, that were handed over in Python."""
    return spec.partition(":")[0] == SCHEME


def _documents(spec: str) -> Iterator[str]:
    documents = _held.get().get(spec)
    if documents is None:
        raise BadInput(f"{spec} were texts in a Python program: name a source that can be read again")
    yield from documents


MEMORY = Source(SCHEME, SCHEME, "Texts of a Python program.", _documents, fingerprint=lambda spec: spec)
