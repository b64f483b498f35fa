"""A teacher's predictions on disk: its k largest log-probabilities for each token that a run will see.

CACHE/teacher-KEY/
  about.json     how many rows, tokens and values; written last
  rows.bin       (n,) int64: which rows of the training data, ascending
  values.bin     (n, T, k) float16: log-probabilities at the temperature
  tokens.bin     (n, T, k) uint16 or uint32: whose they are
  rest.bin       (n, T) float16: the log of the mass of all others
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from pilon_compress.data.batch import Batch
from pilon_compress.data.loader import Dataset
from pilon_compress.data.token_files import UINT16_IDS, cache_folder
from pilon_compress.distill.teacher import Teacher
from pilon_compress.errors import BadInput
from pilon_compress.io import manifest
from pilon_compress.io.checksum import MANIFEST, damage
from pilon_compress.io.disk import atomic_folder, disk_full, part_of
from pilon_compress.io.progress import track
from pilon_compress.parallel import World

log = logging.getLogger(__name__)

ABOUT = "about.json"


@dataclass(frozen=True)
class CacheRequest:
    """A cache request: predictions for `indices`, ascending, of `dataset` with `length` tokens each.

    `made_from` tells data and teacher apart from others; with the rest it is the key.
    """

    dataset: Dataset
    indices: NDArray[np.int64]
    length: int
    count: int
    vocabulary: int
    temperature: float
    made_from: str

    @property
    def key(self) -> str:
        """Return the hash under which the predictions are cached."""
        state = blake2b(self.indices.tobytes(), digest_size=16)
        state.update(json.dumps([1, self.made_from, self.length, self.count, self.temperature]).encode())
        return state.hexdigest()

    @property
    def files(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and shape of each file."""
        n, wide = len(self.indices), (len(self.indices), self.length, self.count)
        ids = "uint16" if self.vocabulary <= UINT16_IDS else "uint32"
        return {
            "rows": ("int64", (n,)),
            "values": ("float16", wide),
            "tokens": (ids, wide),
            "rest": ("float16", wide[:2]),
        }

    @property
    def bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in self.files.values())


class DistillationDataset:
    """The rows of a run, each with what the teacher predicts for it. Only rows that are kept may be asked for."""

    def __init__(self, dataset: Dataset, folder: Path, request: CacheRequest) -> None:
        self.inner, self.folder = dataset, folder
        self.maps = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r", shape=shape)
            for name, (dtype, shape) in request.files.items()
        }

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the rows of `indices` with the teacher's predictions. Raises IndexError for rows without."""
        places = np.searchsorted(self.maps["rows"], indices)
        if not np.array_equal(self.maps["rows"][places], indices):
            raise IndexError("the teacher has not seen these rows")
        soft_targets = {
            "values": torch.from_numpy(self.maps["values"][places]),
            "tokens": torch.from_numpy(self.maps["tokens"][places].astype(np.int64)),
            "rest": torch.from_numpy(self.maps["rest"][places]),
        }
        return replace(self.inner.batch(indices), soft_targets=soft_targets)


def predictions(
    request: CacheRequest,
    teacher: Callable[[], Teacher],
    world: World,
    size: int,
    folder: Path | None = None,
    quiet: bool = True,
) -> DistillationDataset:
    """The rows with their predictions, from `folder` if they are there already; the teacher is asked for only if not.

    All processes take part, each for its share of the rows, `size` at a time; files appear whole or not at all.
    `folder` is that of token files unless given. Raises BadInput where the disk is full.
    """
    home = (folder or cache_folder()).absolute()
    place = home / f"teacher-{request.key}"
    with _locked(home, request.key, world):
        if not world.total(float(world.first and _whole(place, request)))[0]:
            if world.first and not quiet:
                log.info("the teacher's predictions: %s MiB in %s", f"{request.bytes / 2**20:,.0f}", place)
            _build(place, request, teacher(), world, size)
    return DistillationDataset(request.dataset, place, request)


@contextmanager
def _locked(home: Path, key: str, world: World) -> Iterator[None]:
    """Hold the lock of the cache inside the block; the first process holds it for all."""
    if not world.first:
        world.wait()
        yield
        return
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home / f".teacher-{key}.lock")
        lock.acquire()
    except OSError as error:
        raise BadInput(
            f"cannot write {home}: {error.strerror or error}; set PILON_CACHE to a folder that can be written"
        ) from error
    try:
        world.wait()
        yield
    finally:
        lock.release()


def _whole(place: Path, request: CacheRequest) -> bool:
    """True for files that are there with the contents that they were made with; a line says if they are damaged."""
    if not place.is_dir():
        return False
    reason = damage(place) if (place / MANIFEST).is_file() else f"{place} has no {MANIFEST}"
    if reason is not None:
        log.warning("%s: the teacher is asked again", reason)
        return False
    try:
        if json.loads((place / ABOUT).read_text("utf-8")) != _about(request):
            return False
        return all(
            (place / f"{name}.bin").stat().st_size == np.dtype(dtype).itemsize * int(np.prod(shape))
            for name, (dtype, shape) in request.files.items()
        )
    except (OSError, ValueError):
        return False


def _about(request: CacheRequest) -> dict[str, Any]:
    return {
        "rows": len(request.indices),
        "length": request.length,
        "count": request.count,
        "temperature": request.temperature,
    }


def _build(place: Path, request: CacheRequest, teacher: Teacher, world: World, size: int) -> None:
    """Make the folder `place`: every process writes its share of the rows, the first one everything else."""
    opened = atomic_folder(place, manifest.write) if world.first else nullcontext(part_of(place))
    try:
        with opened as work:
            if world.first:
                for name in request.files:
                    (work / f"{name}.bin").touch()
            world.wait()
            failure: OSError | None = None
            try:
                _write(work, request, teacher, world, size)
            except OSError as error:
                failure = error
            if world.total(float(failure is not None))[0]:
                raise failure or OSError(None, "another process could not")
            if world.first:
                request.indices.astype(np.int64).tofile(work / "rows.bin")
                (work / ABOUT).write_text(json.dumps(_about(request)), "utf-8")
    except OSError as error:
        reason = disk_full(error) or error.strerror or str(error)
        raise BadInput(f"cannot write {place}: {reason}; PILON_CACHE can name another") from error
    world.wait()


def _write(work: Path, request: CacheRequest, teacher: Teacher, world: World, size: int) -> None:
    """This process's share: written, not mapped, so that a full disk is an error and not a signal."""
    total = len(request.indices)
    first, last = (total * edge // world.size for edge in (world.rank, world.rank + 1))
    for start in track(range(first, last, size), "teacher", total=-(-(last - first) // size)):
        mine = request.indices[start : min(last, start + size)]
        batch = request.dataset.batch([int(index) for index in mine]).to(world.device)
        found = dict(
            zip(("values", "tokens", "rest"), teacher.largest(batch, request.count, request.temperature), strict=True)
        )
        for name, tensor in found.items():
            dtype, shape = request.files[name]
            with (work / f"{name}.bin").open("r+b") as file:
                file.seek(start * int(np.prod(shape[1:])) * np.dtype(dtype).itemsize)
                file.write(tensor.cpu().numpy().astype(dtype).tobytes())
