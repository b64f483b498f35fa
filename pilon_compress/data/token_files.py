"""Tokenise text once, into cached files that training maps into memory."""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from pilon_compress.data import sequences, text
from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.checksum import MANIFEST, damage
from pilon_compress.io.disk import atomic_folder, disk_full
from pilon_compress.io.progress import track

log = logging.getLogger(__name__)

FORMAT = 2  # of the folder; raise it whenever equal text would give other files
UINT16_IDS = 1 << 16  # ids below this fit two bytes
PARTS: dict[str, text.Part] = {"train": "calibration", "validation": "held-out", "all": "all"}

Part = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Metadata:
    """Metadata of a token file (about.json): its origin, and the counts from which its file sizes follow.

    `kind` is text, paragraphs of N, or chat, which alone has scored.bin. `prefix`: ids that every sequence begins with
    (`data.sequences`). `largest`: the largest id, to be compared with the model's vocabulary.
    """

    kind: str
    source: str
    part: str
    source_state: str
    tokenizer: str
    dtype: str
    eos: int
    prefix: list[int] = field(default_factory=list)
    format: int = FORMAT
    tokens: int = 0
    documents: int = 0
    utf8_bytes: int = 0
    largest: int = 0

    @property
    def key(self) -> str:
        """Return the folder's name: a hash of the origin, without counts."""
        counted = ("tokens", "documents", "utf8_bytes", "largest")
        made_from = {name: value for name, value in asdict(self).items() if name not in counted}
        return blake2b(json.dumps(made_from).encode(), digest_size=16).hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        sizes = {"tokens.bin": self.tokens * np.dtype(self.dtype).itemsize, "starts.bin": 8 * self.documents}
        return sizes | {"scored.bin": self.tokens} if self.kind == "chat" else sizes


class TokenizedDocument(NamedTuple):
    """A document for a token file; `scored` None: every token counts in the loss."""

    ids: Sequence[int]
    utf8_bytes: int
    scored: Sequence[bool] | None = None


@dataclass(frozen=True)
class TokenFile:
    """A tokenised source: its documents in one array, those of plain text with EOS at the end.

    ids     (tokens,) uint16 or uint32, mapped from disk
    starts  (documents,) int64: index in `ids` at which each document begins
    scored  (tokens,) bool: True if a token counts in the loss; None if all do
    """

    folder: Path
    about: Metadata
    ids: NDArray[Any]
    starts: NDArray[np.int64]
    scored: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)


def tokenise(source: str, tokenizer: PreTrainedTokenizerBase, part: Part, folder: Path | None = None) -> TokenFile:
    """Return the token file of a text source (see `text.open_text`), from the cache `folder` if it is there.

    `train` and `validation` never share a document: a hash of its text decides. `folder` may be cleared at any time;
    the default is `cache_folder()`. Files are made again when the source or the tokenizer has changed, or when they are
    damaged; processes that need them at once wait for the first. Raises BadInput for a source that cannot be read, a
    tokenizer without EOS, and a full disk.
    """
    about = described("text", source, tokenizer, part, fingerprint(tokenizer))
    documents = text.open_text(source, PARTS[part])
    framed = sequences.encode_framed(tokenizer, documents)
    items = (TokenizedDocument(ids, len(document.encode())) for document, ids in framed if ids)
    return cached(about, items, folder)


def described(kind: str, source: str, tokenizer: PreTrainedTokenizerBase, part: Part, state: str) -> Metadata:
    """Return the metadata of a token file before it is made; `state`: hash of all that decides the ids.

    Raises BadInput for a tokenizer without EOS.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no eos_token, which must end every document: name one in its config")
    largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    return Metadata(
        kind=kind,
        source=source,
        part=part,
        source_state=text.fingerprint(source),
        tokenizer=state,
        dtype="uint16" if largest < UINT16_IDS else "uint32",
        eos=int(tokenizer.eos_token_id),
        prefix=[one for one in sequences.prefix(tokenizer) if one != tokenizer.eos_token_id] if kind == "text" else [],
    )


def cached(about: Metadata, items: Iterable[TokenizedDocument], folder: Path | None = None) -> TokenFile:
    """Return the token file in `folder` that `about` describes; make it of `items` unless it is there."""
    home = (folder or cache_folder()).absolute()
    place = home / about.key
    tokens = _opened(place)
    if tokens is not None:
        return tokens
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{about.key}.lock"):
            tokens = _opened(place, quiet=False)  # another process may have made it
            if tokens is None:
                _build(place, about, items)
                tokens = _opened(place)
    except OSError as error:
        reason = disk_full(error) or error.strerror or str(error)
        raise BadInput(f"cannot write {home}: {reason}; set PILON_CACHE to a folder that can be written") from error
    assert tokens is not None
    return tokens


def cache_folder() -> Path:
    """Return the folder of token files: $PILON_CACHE or ~/.cache/pilon-compress/tokens."""
    named = os.environ.get("PILON_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "pilon-compress" / "tokens"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides which ids the tokenizer gives a text."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None and hasattr(core, "to_str"):
        state = json.loads(core.to_str())
        state = {name: value for name, value in state.items() if name not in ("padding", "truncation")}
    else:
        state = {"class": type(tokenizer).__name__, "words": sorted(tokenizer.get_vocab().items())}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sequences.prefix(tokenizer)]
    return blake2b(json.dumps([state, special], sort_keys=True).encode(), digest_size=16).hexdigest()


def _opened(place: Path, quiet: bool = True) -> TokenFile | None:
    """Return the token file at `place`; None if it is missing or damaged, which is reported unless `quiet`."""
    if not place.is_dir():
        return None
    reason = damage(place) if (place / MANIFEST).is_file() else f"{place} has no {MANIFEST}"
    if reason is not None:
        if not quiet:
            log.warning("%s: tokenising the text again", reason)
        return None
    try:
        about = Metadata(**json.loads((place / "about.json").read_text("utf-8")))
        if any((place / name).stat().st_size != size for name, size in about.sizes.items()):
            return None
        ids = np.memmap(place / "tokens.bin", about.dtype, "r")
        starts: NDArray[np.int64] = np.memmap(place / "starts.bin", np.int64, "r")
        scored = np.memmap(place / "scored.bin", np.bool_, "r") if "scored.bin" in about.sizes else None
    except (OSError, ValueError, TypeError):  # JSON errors are ValueErrors
        return None
    return TokenFile(place, about, ids, starts, scored)


def _build(place: Path, about: Metadata, items: Iterable[TokenizedDocument]) -> None:
    """Make the folder `place`, which appears complete or not at all. The caller holds the lock."""
    with atomic_folder(place, manifest.write) as work:
        _write(work, about, items)


def _write(work: Path, about: Metadata, items: Iterable[TokenizedDocument]) -> None:
    tokens = documents = size = largest = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((work / name).open("wb")) for name in about.sizes}
        for item in track(items, f"tokens of {about.source}"):
            files["starts.bin"].write(np.int64(tokens).tobytes())
            files["tokens.bin"].write(np.array(item.ids, about.dtype).tobytes())
            if item.scored is not None:
                files["scored.bin"].write(np.array(item.scored, np.bool_).tobytes())
            tokens, documents, largest = tokens + len(item.ids), documents + 1, max([largest, *item.ids])
            size += item.utf8_bytes
    if tokens < 2:
        raise BadInput(f"{about.source} holds no text that the tokenizer knows")
    counted = {"tokens": tokens, "documents": documents, "utf8_bytes": size, "largest": largest}
    (work / "about.json").write_text(json.dumps(asdict(about) | counted, indent=1), "utf-8")
