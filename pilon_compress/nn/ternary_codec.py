"""Ternary digits as bytes: four in a byte (2 bits each), or five (base 3).

    2bit    byte = Σ (digit + 1) · 4^i, i < 4       2 bits a digit, cheapest to read
    base3   byte = Σ (digit + 1) · 3^i, i < 5       1.6 bits a digit, smallest on disk

Digits are taken in the order in which they lie in memory, row by row of a primitive, and filled up with zeros.
"""

import torch
from torch import Tensor

PER_BYTE = {"2bit": 4, "base3": 5}
BASE = {"2bit": 4, "base3": 3}


def packed_size(digits: int, encoding: str) -> int:
    """Bytes for so many digits."""
    return -(-digits // PER_BYTE[encoding])


def pack(digits: Tensor, encoding: str) -> Tensor:
    """`digits` (n, ...) of -1, 0, 1 as bytes (n, packed_size), uint8."""
    flat = digits.flatten(1).to(torch.int16) + 1
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[1] % PER_BYTE[encoding]), value=1)
    return (flat.unflatten(1, (-1, PER_BYTE[encoding])) * _powers(encoding)).sum(-1).to(torch.uint8)


def unpack(codes: Tensor, shape: tuple[int, ...], encoding: str) -> Tensor:
    """Return the ternary weights (n, *shape), int8, that `pack` encoded."""
    fields = codes.to(torch.int16)[..., None] // _powers(encoding).to(codes.device) % BASE[encoding]
    digits = (fields - 1).to(torch.int8).flatten(1)
    return digits[:, : torch.Size(shape).numel()].unflatten(1, shape).contiguous()


def valid(codes: Tensor, encoding: str) -> bool:
    """Return True if `pack` can produce `codes`: no field of 2 bits is 3, no byte above 3^5 - 1."""
    if encoding == "base3":
        return bool((codes < 3 ** PER_BYTE["base3"]).all())
    return not bool((codes & (codes >> 1) & 0b01010101).any())


def _powers(encoding: str) -> Tensor:
    return BASE[encoding] ** torch.arange(PER_BYTE[encoding], dtype=torch.int16)
