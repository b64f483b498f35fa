"""Packed ternary weights, of models that no longer change: digits in bytes, one vector of scales per projection.

    TernaryBank    A, B latent            ->  PackedBank     A_codes, B_codes        shared digits, stored once
    ComposedLinear weight (k, r)          ->  the same, weight = scale (k, r) float32: composition and both weight
                                              scales in one
    TernaryLinear  weight (d_out, d_in)   ->  PackedLinear   codes, weight = scale (d_out,) float32

Forward passes are the kernels' (`kernels.dispatch`), which compute what `nn.ternary_quantizer` computes, bit for bit.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.kernels import dispatch
from pilon_compress.kernels.cpu_layout import BankTiles, MatrixTiles
from pilon_compress.kernels.dispatch import UnpackedBank
from pilon_compress.kernels.gpu_layout import MULTIPLE, BankWords, MatrixWords
from pilon_compress.nn.additions import added, addition
from pilon_compress.nn.bank import PrimitiveBank, Segment
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.formats.registry import FORMATS, Format
from pilon_compress.nn.formats.ternary import TernaryBank, TernaryLinear
from pilon_compress.nn.lazy import LazyValue
from pilon_compress.nn.part import Chosen, Matrix
from pilon_compress.nn.ternary_codec import PER_BYTE, pack, packed_size, unpack, valid
from pilon_compress.nn.ternary_quantizer import digits


@dataclass
class Unpacked:
    """A bank's digits as they are computed with, and the layers that do, by the address of their weight.

    None where the rank suits no kernel: each layer then holds the primitives that it selects, side by side.
    """

    digits: "BankTiles | BankWords | UnpackedBank | None"  # quoted: a bundle holds this file, and not the kernels
    layers: defaultdict[int, LazyValue[Callable[[Tensor], Tensor]]] = field(
        default_factory=lambda: defaultdict(LazyValue)
    )


class PackedBank(PrimitiveBank):
    """A bank of digits: `A_codes` of (n, d_in, r), `B_codes` of (n, r, d_out), by `encoding` (see
    `nn.ternary_codec`)."""

    folds = False
    exact_compositions = True
    A_codes: Tensor
    B_codes: Tensor

    def __init__(self, d_in: int, d_out: int, n_primitives: int, rank: int, encoding: str) -> None:
        nn.Module.__init__(self)  # no A and B
        self.shape, self.encoding = (n_primitives, d_in, rank, d_out), encoding
        self.format = f"ternary-{encoding}"
        for name, numbers in (("A_codes", d_in * rank), ("B_codes", rank * d_out)):
            shape = (n_primitives, packed_size(numbers, encoding))
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))
        self._gathered: defaultdict[int, LazyValue[Unpacked]] = defaultdict(LazyValue)
        self._unpacked: defaultdict[int, LazyValue[Unpacked]] = defaultdict(LazyValue)  # by group

    @property
    def n_primitives(self) -> int:
        """Return the number of primitives."""
        return self.shape[0]

    @property
    def d_in(self) -> int:
        """Return the width of the input."""
        return self.shape[1]

    @property
    def rank(self) -> int:
        """Return the rank of each primitive."""
        return self.shape[2]

    @property
    def d_out(self) -> int:
        """Return the width of the output."""
        return self.shape[3]

    def digits(self) -> tuple[Tensor, Tensor]:
        """A (n, d_in, r) and B (n, r, d_out), int8."""
        A = unpack(self.A_codes, (self.d_in, self.rank), self.encoding)
        return A, unpack(self.B_codes, (self.rank, self.d_out), self.encoding)

    def primitives(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the digits of the `selected` (k,) primitives in float32: A (k, d_in, r), B (k, r, d_out)."""
        A, B = self.digits()
        return A[selected].float(), B[selected].float()

    @torch.no_grad()
    def keep(self, used: Tensor) -> None:
        """Drop, in place, the primitives that the mask `used` (n,) leaves out."""
        self.A_codes, self.B_codes = self.A_codes[used].clone(), self.B_codes[used].clone()
        self.shape = (int(used.sum()), *self.shape[1:])

    def forward(
        self,
        x: Tensor,
        selected: Tensor,
        weight: Tensor,
        group: int = 0,
        shift: Tensor | None = None,
        *,
        segments: Sequence[Segment] = (),
    ) -> Tensor:
        """Compose the `selected` (k,) primitives on `x` (..., d_in), with scales `weight` (k, r).

        `shift` (k, r) is added to the latent behind its scale: that of `research.original.form`. No `segments`:
        experts are not packed.
        """
        assert not segments
        codes = (self.A_codes, self.B_codes)
        if self.rank % MULTIPLE and not torch.compiler.is_compiling():  # which knows no addresses
            layers = self._gathered[group].get(codes, lambda: Unpacked(None)).layers
            gather = partial(self._gather, selected, weight, shift, group)
            return layers[weight.data_ptr()].get((selected, weight), gather)(x)
        unpacked = self._unpacked[group].get(codes, lambda: Unpacked(dispatch.bank(*self.digits(), group, self.label)))
        assert unpacked.digits is not None
        make = partial(_layer, unpacked.digits, selected, weight, shift, group)
        if torch.compiler.is_compiling():
            return make()(x)
        return unpacked.layers[weight.data_ptr()].get((selected, weight), make)(x)

    def _gather(self, selected: Tensor, weight: Tensor, shift: Tensor | None, group: int) -> Callable[[Tensor], Tensor]:
        digits = dispatch.bank(*dispatch.side_by_side(*self.digits(), selected), group, self.label)
        return _layer(digits, selected.new_zeros(1), weight, shift, group)

    def refuse(self) -> str | None:
        """Return why the bytes are no ternary digits; None if they are."""
        sound = valid(self.A_codes, self.encoding) and valid(self.B_codes, self.encoding)
        return None if sound else "holds bytes that are no ternary digits"

    def extra_repr(self) -> str:
        """Return the sizes and the encoding, for `print`."""
        return f"{super().extra_repr()}, encoding={self.encoding}"


def _layer(
    digits: "BankTiles | BankWords | UnpackedBank",
    selected: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    group: int,
) -> Callable[[Tensor], Tensor]:
    shift = None if shift is None else shift.reshape(-1).float()
    return dispatch.composed(digits, selected, weight.reshape(-1).float(), shift, group)


class PackedLinear(Matrix, nn.Module):
    """A dense matrix of digits: `codes` of (d_in, d_out), packed by `encoding`, and a scale per output."""

    folds = False
    codes: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool,
        host_shape: tuple[int, int],
        encoding: str,
        group: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.host_shape = d_in, d_out, host_shape
        self.encoding, self.group, self.format = encoding, group, f"ternary-{encoding}"
        self.register_buffer("codes", torch.empty((1, packed_size(d_in * d_out, encoding)), dtype=torch.uint8))
        self.weight = nn.Parameter(torch.empty(d_out))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self._unpacked: LazyValue[MatrixTiles | MatrixWords | Tensor] = LazyValue()
        self._computed: LazyValue[Callable[[Tensor], Tensor]] = LazyValue()
        self._parts: defaultdict[int, LazyValue[Callable[[Tensor], Tensor]]] = defaultdict(LazyValue)  # by address

    def digits(self) -> Tensor:
        """(d_in, d_out), int8."""
        return unpack(self.codes, (self.in_features, self.out_features), self.encoding)[0]

    def forward(self, x: Tensor, chosen: Chosen | None = None, inputs: bool = False) -> Tensor:
        """Compute `Matrix.forward`; each selection has its weights unpacked for the kernel at its first call."""
        compiling = torch.compiler.is_compiling()
        if chosen is None:
            run = self._run() if compiling else self._computed.get((self.codes, self.weight), self._run)
        else:
            make = partial(self._part, chosen.indices, inputs)
            sources = (self.codes, self.weight, chosen.indices)
            run = make() if compiling else self._parts[chosen.indices.data_ptr()].get(sources, make)
        y = run(x)
        return y if self.bias is None else y + self.bias

    def _part(self, indices: Tensor, inputs: bool) -> Callable[[Tensor], Tensor]:
        digits = self.digits().index_select(0 if inputs else 1, indices)
        scale = self.weight if inputs else self.weight.index_select(0, indices)
        return dispatch.multiplied(dispatch.matrix(digits, self.group, self.label), scale.float(), self.group)

    def _run(self) -> Callable[[Tensor], Tensor]:
        digits = self._unpacked.get((self.codes,), lambda: dispatch.matrix(self.digits(), self.group, self.label))
        return dispatch.multiplied(digits, self.weight.float(), self.group)

    def matrix(self) -> Tensor:
        """Return the weight (d_in, d_out) in float32: digits times scales."""
        return self.digits() * self.weight

    def own_types(self) -> dict[str, torch.dtype]:
        """Return the tensors that keep their dtype when a model is cast: the scales."""
        return {"weight": torch.float32}

    def refuse(self) -> str | None:
        """Return why bytes or scales are damaged; None if they are sound."""
        if not valid(self.codes, self.encoding):
            return "holds bytes that are no ternary digits"
        sound = torch.isfinite(self.weight).all() and self.weight.any()
        return None if sound else "holds scales that are zero or not finite"


class PackedTernaryFormat(Format):
    """Digits in bytes by an `encoding` of `nn.ternary_codec`, and float32 scales."""

    final = True
    packs = "ternary"
    exact_compositions = True
    travels = False  # its kernels are compiled
    multiple = MULTIPLE

    def __init__(self, encoding: str) -> None:
        super().__init__(f"ternary-{encoding}")
        self.encoding = encoding
        self.bits = 8 / PER_BYTE[encoding]
        self.about = {"base3": "ternary, five weights in a byte", "2bit": "ternary, two bits per weight"}[encoding]

    def bank(self, d_in: int, d_out: int, n_primitives: int, rank: int) -> PrimitiveBank:
        """Return a bank of packed digits, not filled."""
        return PackedBank(d_in, d_out, n_primitives, rank, self.encoding)

    def matrix(self, d_in: int, d_out: int, bias: bool, host_shape: tuple[int, int], group: int) -> "PackedLinear":
        """Return a matrix of packed digits, not filled."""
        return PackedLinear(d_in, d_out, bias, host_shape, self.encoding, group)

    def matrix_bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of rows × columns packed digits."""
        return packed_size(rows * columns, self.encoding)

    def matrix_scales(self, d_out: int) -> int:
        """Return the scales of a dense matrix: one for each output."""
        return d_out

    def kernel(self, device: str, d_in: int, group: int) -> str:
        found = dispatch.kernel(device, d_in, group)
        return f"torch, slow: {found.reason}" if found.reason else f"ternary {found.name}"

    def pack_bank(self, bank: TernaryBank) -> PackedBank:
        """Return a packed copy of a ternary bank."""
        A, B = bank.eval().digits(torch.arange(bank.n_primitives, device=bank.A.device))
        made = PackedBank(bank.d_in, bank.d_out, bank.n_primitives, bank.rank, self.encoding)
        made.A_codes, made.B_codes = pack(A, self.encoding), pack(B, self.encoding)
        return made

    def pack_projection(self, layer: ComposedLinear, bank: PackedBank) -> ComposedLinear:
        """Fold composition and weight scales into one scale per component; additions of the bank fold themselves."""
        selected, weight = layer.coefficients()
        own: Any = layer.bank  # a TernaryBank
        scale, _ = own.folded(selected, weight)
        k, rank = len(selected), bank.rank
        made = ComposedLinear(bank, k, layer.bias is not None, "component", layer.host_shape, layer.group)
        made.selected = selected.clone()
        made.weight = nn.Parameter(scale.reshape(k, rank).clone())
        made.bias = layer.bias
        for name, kind in added(own):
            addition(name, kind).packed(layer, made)
        return made

    def pack_matrix(self, matrix: TernaryLinear) -> "PackedLinear":
        """Return a packed copy of a ternary matrix."""
        scale = matrix.scales()
        d_in, d_out = matrix.in_features, matrix.out_features
        made = PackedLinear(d_in, d_out, matrix.bias is not None, matrix.host_shape, self.encoding, matrix.group)
        made.codes = pack(digits(matrix.weight, scale).T[None], self.encoding)
        made.weight = nn.Parameter(scale.squeeze(-1).expand(d_out).clone())
        made.bias = matrix.bias
        return made


for _encoding in PER_BYTE:
    FORMATS.add(f"ternary-{_encoding}", PackedTernaryFormat(_encoding))
