"""Read GGUF files as dense models: transformers reads a file once, and the cache keeps it as an ordinary folder.

A quantised GGUF holds no float weights. The folder has the exact dequantised values in float32, but its config says
bfloat16, the dtype that the original models were published in: conversions save in that dtype.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from hashlib import blake2b
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil
from filelock import FileLock

from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.checksum import damage
from pilon_compress.io.disk import atomic_folder
from pilon_compress.io.errors import first_line

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
MOST_PARTS = 100
FORMAT = 1  # of the cached folder; raise it whenever reading would give another result
MAGIC = b"GGUF"
SIXTEEN_BIT = {"F16": "float16", "BF16": "bfloat16"}
READING = 1.3  # memory that reading takes ÷ the float32 weights: one quantised tensor and a copy come on top
DONE = "done.json"


def dense_folder(files: Sequence[Path], origin: str, sums: Path | None = None) -> Path:
    """Return the dense folder of a GGUF file, or of the `files` that are its parts in order.

    The first call reads the file into `cache()`; later calls find it there. `origin` names the model in messages;
    `sums` is a SHA256SUMS file that the joined parts must agree with. Raises BadInput where the file is damaged, split,
    too large for the memory, or of an architecture that transformers does not read.
    """
    if find_spec("gguf") is None:
        raise BadInput(f"{origin} is a GGUF file: pip install 'pilon-compress[gguf]' to read it")
    with files[0].open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise BadInput(f"{origin} is not a GGUF file, or damaged: it does not begin with GGUF")
    place = cache() / _key(files)
    if _is_intact(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f".{place.name}.lock"):
            if not _is_intact(place):  # another process may have made it
                _make(place, files, origin, sums)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadInput(
            f"cannot write {place.parent}: {reason}; set PILON_CACHE to a folder that can be written"
        ) from error
    return place


def _is_intact(place: Path) -> bool:
    """Return True if the folder is there and undamaged; report damage to stderr."""
    if not (place / DONE).is_file():
        return False
    reason = damage(place)
    if reason is not None:
        log.warning("%s: reading the GGUF file again", reason)
    return reason is None


def cache() -> Path:
    """Return the folder of dense models read from GGUF files: $PILON_CACHE/gguf or ~/.cache/pilon-compress/gguf."""
    named = os.environ.get("PILON_CACHE")
    return (Path(named).expanduser() if named else Path.home() / ".cache" / "pilon-compress") / "gguf"


def _key(files: Sequence[Path]) -> str:
    """Return the name of the cached folder: the file's stem, and a hash of path, size, time and reader versions."""
    state = [str(FORMAT), version("transformers"), version("gguf")]
    for path in files:
        stat = path.stat()
        state.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")
    return f"{files[0].name.partition('.gguf')[0]}-{blake2b(chr(10).join(state).encode(), digest_size=8).hexdigest()}"


def _make(place: Path, files: Sequence[Path], origin: str, sums: Path | None) -> None:
    joined = place.with_name(f".{place.name}{SUFFIX}")
    try:
        source = files[0]
        if len(files) > 1:
            source = joined
            _join(files, source, sums, origin)
        log.info("reading %s into %s; later runs use that folder", origin, place)
        with atomic_folder(place) as work:
            # in a process of its own, whose memory is freed and whose libraries' messages are captured
            done = subprocess.run(
                [sys.executable, "-m", "pilon_compress.models.gguf", str(source), str(work)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [f"the reader ended with code {done.returncode}"])[-1]
                raise BadInput(f"cannot read {origin}: {last}")
    finally:
        joined.unlink(missing_ok=True)


def _join(files: Sequence[Path], target: Path, sums: Path | None, origin: str) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for path in files:
            with path.open("rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
                    out.write(block)
    stated = {line.split()[0] for line in sums.read_text().splitlines() if line.split()} if sums else set()
    if stated and digest.hexdigest() not in stated:
        raise BadInput(f"{origin}: the joined parts do not have the checksum in {sums}: install them again")


def read(source: Path, folder: Path) -> None:
    """Read a GGUF file with transformers and write config, weights and tokenizer to `folder`, which exists.

    Raises BadInput for a file that is split or does not fit the memory; errors of transformers pass through.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = GGUFReader(source)
    count = reader.fields.get("split.count")
    if count is not None and int(count.parts[-1][0]) > 1:
        raise BadInput("it is one of several files: join them with `llama-gguf-split --merge` first")
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    needed, free = READING * 4 * parameters, psutil.virtual_memory().available
    if needed > free:
        raise BadInput(f"reading it takes {needed / 2**30:.3g} GiB of memory, but {free / 2**30:.3g} GiB are free")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors} - {"F32"}
    only_kind = next(iter(kinds)) if len(kinds) == 1 else ""
    stored = SIXTEEN_BIT.get(only_kind, "float32")
    del reader
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=getattr(torch, stored), trust_remote_code=False
    )
    # transformers refuses to save the model because it was read from a quantised file
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "bfloat16" if kinds and stored == "float32" else stored
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / DONE).write_text(json.dumps({"format": FORMAT, "types": sorted(kinds)}) + "\n")
    manifest.write(folder)


def _main() -> None:
    source, folder = map(Path, sys.argv[1:])
    try:
        read(source, folder)
    except Exception as error:  # the calling process reports the last line
        print(first_line(error), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _main()
