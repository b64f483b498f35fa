"""The dense model as GGUF files, for a benchmark against llama.cpp."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pilon_compress.config.benchmark import LLAMA_CPP
from pilon_compress.errors import BadInput
from pilon_compress.export import gguf
from pilon_compress.export.llama_cpp import architectures, server, tensors, vocabulary
from pilon_compress.models import checkpoint

DEFAULTS: tuple[tensors.Type, ...] = ("q4_0", "q8_0")


def known_types(asked: Sequence[str]) -> list[tensors.Type]:
    """Return the types of files to make: those asked for, or the defaults. Raises BadInput for an unknown one."""
    for one in asked:
        if one not in tensors.TYPES:
            raise BadInput(
                f"--against: no llama.cpp file of type {one!r} is made here: take {', '.join(tensors.TYPES)}"
            )
    return [one for one in tensors.TYPES if one in asked] if asked else list(DEFAULTS)


def check_installed() -> None:
    """Raise BadInput where llama.cpp is not installed."""
    if not server.available():
        raise BadInput(f"--against {LLAMA_CPP} needs llama.cpp: pip install 'pilon-compress[llama-cpp]'")


def check(dense: str) -> None:
    """Raise BadInput where llama.cpp cannot run the dense causal model."""
    config = checkpoint.load_config(dense)
    checkpoint.check_dense(dense, config)
    reason = architectures.refuse(config) or vocabulary.refuse(Path(checkpoint.resolve(dense)))
    if reason:
        raise BadInput(f"{dense} {reason}")


def write(dense: str, kinds: Sequence[tensors.Type], folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield each type with its file, once llama.cpp has loaded it and agrees with the dense model in float32.

    Raises BadInput where no matrix of the model takes a type, and ExportFailed where llama.cpp computes something else.
    """
    source = Path(checkpoint.resolve(dense))
    for kind in kinds:
        model = checkpoint.load_model(dense, dtype="float32")  # anew, since `verify` rounds it
        path = folder / f"{kind}{gguf.SUFFIX}"
        _, counts = gguf.write_file(path, model, kind, source)
        main = {"q4_k_m": "Q4_K"}.get(kind, kind.upper())
        if main not in counts:
            made = ", ".join(sorted(set(counts) - {"F32"}))
            raise BadInput(
                f"--against: no matrix of {dense} can be {kind}, its rows do not fill the blocks (but {made})"
            )
        gguf.verify(path, model, dense, kind, {})
        yield kind, path
