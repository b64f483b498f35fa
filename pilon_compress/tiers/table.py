"""A tensor in a file, whose rows are read when they are asked for."""

import json
import mmap
import struct
import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pilon_compress.io.tensor_store import FLOATS


class Table:
    """A tensor of `shape` in a file, from the byte `offset` on: memory-mapped, or in pinned memory for a GPU.

    values: the tensor, whose pages are read when they are touched   writable: changes go to the file
    """

    def __init__(
        self, file: Path, dtype: torch.dtype, shape: Sequence[int], offset: int = 0, writable: bool = False
    ) -> None:
        size = prod(shape) * dtype.itemsize
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        with file.open("r+b" if writable else "rb") as opened:
            self._map: mmap.mmap | None = mmap.mmap(opened.fileno(), size + offset - start, access=access, offset=start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it must not be written to, which nobody does
            flat = torch.frombuffer(self._map, dtype=dtype, count=prod(shape), offset=offset - start)
        self.values = flat.view(*shape)
        self._ahead: tuple[Tensor, Any] | None = None

    @classmethod
    def new(cls, file: Path, dtype: torch.dtype, shape: Sequence[int]) -> "Table":
        """Make the file, of zeros, which take no room on the disk until they are written to; it can be written."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as made:
            made.truncate(prod(shape) * dtype.itemsize)
        return cls(file, dtype, shape, writable=True)

    def read_ahead(self, device: torch.device) -> None:
        """Begin to read all of it, without waiting; for a GPU into its memory."""
        if device.type != "cuda":
            self._advise("MADV_WILLNEED")
        elif self._ahead is None:
            self._pin()
            with torch.cuda.stream(side := torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
                copied = self.values.to(device, non_blocking=True)
            self._ahead = copied, side

    def release(self) -> None:
        """Give back the memory that reading took; what was written stays in the file."""
        self._ahead = None
        self._advise("MADV_DONTNEED")

    def rows(self, axis: int, chosen: Tensor, device: torch.device) -> Tensor:
        """Return copies of the `chosen` rows (m,), indices on the CPU, along `axis`, on the device."""
        if device.type != "cuda":
            return self.values.index_select(axis, chosen)
        self.read_ahead(device)
        assert self._ahead is not None
        copied, side = self._ahead
        now = torch.cuda.current_stream(device)
        now.wait_stream(side)
        copied.record_stream(now)
        return copied.index_select(axis, chosen.to(device))

    def _pin(self) -> None:
        if self._map is not None:
            self.values, self._map = self.values.pin_memory(), None

    def _advise(self, advice: str) -> None:
        if self._map is not None and hasattr(mmap, advice):  # not on every system
            self._map.madvise(getattr(mmap, advice))


def tables_in(file: Path, names: Sequence[str]) -> dict[str, Table]:
    """Return those of the tensors `names` that a safetensors file holds. Raises ValueError where one is no float's."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    found = {}
    for name in names:
        if name not in header:
            continue
        entry = header[name]
        if entry["dtype"] not in FLOATS:
            raise ValueError(f"{name} is in {entry['dtype']}, no float: a bank of it has no tiers")
        found[name] = Table(file, FLOATS[entry["dtype"]], entry["shape"], 8 + length + entry["data_offsets"][0])
    return found
