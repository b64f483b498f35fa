"""What a ternary model is once it no longer changes: digits as bytes, and one vector of scales per projection.

    TernaryBank    A, B latent            ->  PackedBank     A_codes, B_codes        shared digits, stored once
    ComposedLinear weight (k, r)          ->  the same, weight = scale (k, r) float32: composition and both weight
                                              scales in one
    TernaryLinear  weight (d_out, d_in)   ->  PackedLinear   codes, weight = scale (d_out,) float32

Forward passes are the kernels' (`kernels.dispatch`), which compute what `nn.ternary_quantizer` computes, bit for bit.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pilon_compress.kernels import dispatch
from pilon_compress.kernels.cpu_layout import BankTiles, MatrixTiles
from pilon_compress.kernels.dispatch import UnpackedBank
from pilon_compress.kernels.gpu_layout import BankWords, MatrixWords
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.lazy import Ready
from pilon_compress.nn.ternary_codec import packed_size, unpack, valid


@dataclass
class Unpacked:
    """A bank's digits as they are computed with, and the layers that do, by the address of their weight."""

    digits: "BankTiles | BankWords | UnpackedBank"  # quoted: a bundle holds this file, and not the kernels
    layers: defaultdict[int, Ready[Callable[[Tensor], Tensor]]] = field(default_factory=lambda: defaultdict(Ready))


class PackedBank(PrimitiveBank):
    """A bank of digits: `A_codes` of (n, d_in, r), `B_codes` of (n, r, d_out), by `encoding` (see
    `nn.ternary_codec`)."""

    A_codes: Tensor
    B_codes: Tensor

    def __init__(self, d_in: int, d_out: int, n_primitives: int, rank: int, encoding: str) -> None:
        nn.Module.__init__(self)  # no A and B
        self.shape, self.encoding = (n_primitives, d_in, rank, d_out), encoding
        for name, numbers in (("A_codes", d_in * rank), ("B_codes", rank * d_out)):
            shape = (n_primitives, packed_size(numbers, encoding))
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))
        self._unpacked: defaultdict[int, Ready[Unpacked]] = defaultdict(Ready)  # by group

    @property
    def n_primitives(self) -> int:
        return self.shape[0]

    @property
    def d_in(self) -> int:
        return self.shape[1]

    @property
    def rank(self) -> int:
        return self.shape[2]

    @property
    def d_out(self) -> int:
        return self.shape[3]

    def digits(self) -> tuple[Tensor, Tensor]:
        """A (n, d_in, r) and B (n, r, d_out), int8."""
        A = unpack(self.A_codes, (self.d_in, self.rank), self.encoding)
        return A, unpack(self.B_codes, (self.rank, self.d_out), self.encoding)

    def primitives(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        A, B = self.digits()
        return A[selected].float(), B[selected].float()

    @torch.no_grad()
    def keep(self, used: Tensor) -> None:
        self.A_codes, self.B_codes = self.A_codes[used].clone(), self.B_codes[used].clone()
        self.shape = (int(used.sum()), *self.shape[1:])

    def forward(
        self, x: Tensor, selected: Tensor, weight: Tensor, group: int = 0, shift: Tensor | None = None
    ) -> Tensor:
        """Compose the `selected` (k,) primitives on `x` (..., d_in), with scales `weight` (k, r).

        `shift` (k, r) is added to the latent behind its scale: that of `research.original.form`.
        """
        codes = (self.A_codes, self.B_codes)
        unpacked = self._unpacked[group].get(codes, lambda: Unpacked(dispatch.bank(*self.digits(), group)))
        make = partial(_layer, unpacked.digits, selected, weight, shift, group)
        if torch.compiler.is_compiling():
            return make()(x)
        return unpacked.layers[weight.data_ptr()].get((selected, weight), make)(x)

    def refuse(self) -> str | None:
        """What is wrong with the bytes, if anything."""
        sound = valid(self.A_codes, self.encoding) and valid(self.B_codes, self.encoding)
        return None if sound else "holds bytes that are no ternary digits"

    def extra_repr(self) -> str:
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


class PackedLinear(nn.Module):
    """A kept matrix of digits: `codes` of (d_in, d_out), packed by `encoding`, and a scale per output."""

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
        self.encoding, self.group = encoding, group
        self.register_buffer("codes", torch.empty((1, packed_size(d_in * d_out, encoding)), dtype=torch.uint8))
        self.weight = nn.Parameter(torch.empty(d_out))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self._unpacked: Ready[MatrixTiles | MatrixWords | Tensor] = Ready()
        self._computed: Ready[Callable[[Tensor], Tensor]] = Ready()

    def digits(self) -> Tensor:
        """(d_in, d_out), int8."""
        return unpack(self.codes, (self.in_features, self.out_features), self.encoding)[0]

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., d_in) -> (..., d_out)."""
        compiling = torch.compiler.is_compiling()
        run = self._run() if compiling else self._computed.get((self.codes, self.weight), self._run)
        y = run(x)
        return y if self.bias is None else y + self.bias

    def _run(self) -> Callable[[Tensor], Tensor]:
        digits = self._unpacked.get((self.codes,), lambda: dispatch.matrix(self.digits(), self.group))
        return dispatch.multiplied(digits, self.weight.float(), self.group)

    def matrix(self) -> Tensor:
        """(d_in, d_out), as it counts in the forward pass."""
        return self.digits() * self.weight

    def refuse(self) -> str | None:
        """As `PackedBank.refuse`."""
        return None if valid(self.codes, self.encoding) else "holds bytes that are no ternary digits"


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """The scales of packed projections by parameter name: they stay in float32 whatever the others are."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        composed = isinstance(module, ComposedLinear) and isinstance(module.bank, PackedBank)
        if composed or isinstance(module, PackedLinear):
            found[f"{name}.weight"] = module.weight
    return found
