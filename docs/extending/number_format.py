"""A number format of your own: 8-bit floats (E4M3, Micikevicius et al., 2022) with a scale for every column.

    PILON_PLUGINS=number_format.py pilon-compress convert gpt2 --ffn-ratio 0.7 --bank-dtype float8 -o out/gpt2-float8
    PILON_PLUGINS=number_format.py pilon-compress compare gpt2 --methods pilon-float8,rtn-float8,gptq-float8 -o out/rows

This file is all: which scales there are, which codes, how codes are stored, and one registration. Modules, sizes,
rounding with error feedback, reports, damage checks and self-contained exports follow from it.
"""

import torch
from torch import Tensor

from pilon_compress.nn.formats.quantised import QuantisedFormat
from pilon_compress.nn.formats.registry import FORMATS, Grid


class Float8Grid(Grid):
    """Codes are E4M3 numbers, kept in bfloat16 while they are computed with, and stored as bytes."""

    bits = 8.0
    code_dtype = torch.bfloat16  # holds E4M3 exactly
    LARGEST = 448.0

    def scales(self, weight: Tensor) -> Tensor:
        """Scales (n, 1, m) that bring the largest number of every column to the largest code."""
        scale = weight.abs().amax(1, keepdim=True) / self.LARGEST
        return scale.clamp_min(1e-12).to(torch.bfloat16)

    def nearest(self, ratio: Tensor) -> Tensor:
        clipped = ratio.clamp(-self.LARGEST, self.LARGEST)
        return clipped.float().to(torch.float8_e4m3fn).to(ratio.dtype)

    def pack(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)

    def unpack(self, stored: Tensor, shape: tuple[int, int]) -> Tensor:
        return stored.view(torch.float8_e4m3fn).float().unflatten(1, shape)

    def refuse(self, stored: Tensor) -> str | None:
        return "holds bytes that are no number" if bool((stored & 0x7F == 0x7F).any()) else None  # NaN of E4M3


FORMATS.add("float8", QuantisedFormat("float8", Float8Grid(), "float8 (E4M3), a scale per column"))
