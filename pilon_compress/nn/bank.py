"""The bank: low-rank primitives that every layer of a band shares."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pilon_compress.nn.part import Part
from pilon_compress.nn.sharded import full

Segment = tuple[int, int, int]  # (expert, start, end) of rows that are sorted by expert


class PrimitiveBank(Part, nn.Module):
    """`n_primitives` low-rank primitives for one band and role.

        A: (n, d_in, r)   B: (n, r, d_out)        y = sum over selected p of  x A_p diag(g_p) B_p

             x (d_in) --A_p--> u (r) --g_p--> --B_p--> y (d_out)

    The bank is owned once by the model; layers call it with their own composition. They must call it rather than
    read `A` and `B`, so that FSDP can gather the parameters first.

    format: name in `nn.formats`   folds: two plain matrices compute the same as a composition of its primitives
    exact_compositions: compositions of it stay in float32
    """

    format: str = "none"
    folds: bool = True
    exact_compositions: bool = False

    def __init__(self, d_in: int, d_out: int, n_primitives: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(n_primitives, d_in, rank))
        self.B = nn.Parameter(torch.empty(n_primitives, rank, d_out))

    @property
    def n_primitives(self) -> int:
        """Return n, the number of primitives."""
        return self.A.shape[0]

    @property
    def rank(self) -> int:
        """Return r, the rank of a primitive."""
        return self.A.shape[2]

    @property
    def d_in(self) -> int:
        """Return the number of inputs."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Return the number of outputs."""
        return self.B.shape[2]

    def forward(
        self, x: Tensor, selected: Tensor, weight: Tensor, group: int = 0, *, segments: Sequence[Segment] = ()
    ) -> Tensor:
        """Compose the `selected` (k,) primitives with `weight` (k, r) or (k, 1) on `x` (..., d_in): two GEMMs.

        `weight` (N, k, r): coefficients of each row of `x` (N, d_in). `group` matters to banks that quantise their
        inputs. With `segments` of the rows `x` (N, d_in), those of expert
        e are composed with `selected[e]` and `weight[e]`.
        """
        if segments:
            return self.by_segment(x, selected, weight, group, segments)
        k, r = selected.shape[0], self.rank
        A, B = (factor.to(x.dtype) for factor in self.primitives(selected))
        A, B = A.permute(1, 0, 2).reshape(self.d_in, k * r), B.reshape(k * r, self.d_out)
        factor, shift = self.affine(weight)
        u = x @ A
        u = u * factor.to(u.dtype).expand(*factor.shape[:-2], k, r).flatten(-2)
        return (u if shift is None else u + shift.to(u.dtype).expand(k, r).reshape(k * r)) @ B

    def by_segment(
        self, x: Tensor, selected: Tensor, weight: Tensor, group: int, segments: Sequence[Segment]
    ) -> Tensor:
        """Compute `forward` with an expert for each segment."""
        parts = [self.forward(x[start:end], selected[expert], weight[expert], group) for expert, start, end in segments]
        return torch.cat(parts)

    def affine(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Factor and shift, (k, r) or (k, 1), that turn the latent x A into the one that meets B; None: no shift.

        Both are linear in `weight`, the composition's.
        """
        return weight, None

    def primitives(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """The selected A (k, d_in, r) and B (k, r, d_out) as they count in the forward pass."""
        return self.A.index_select(0, selected), self.B.index_select(0, selected)

    def sizes(self) -> Tensor:
        """‖a‖ · ‖b‖ of every component (n, r), whole on every process: of banks that train."""
        return full(self.A.detach().norm(dim=1)) * full(self.B.detach().norm(dim=2))

    @torch.no_grad()
    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Fill A and B, in place, with N(0, std²)."""
        self.A.normal_(0, std, generator=generator)
        self.B.normal_(0, std, generator=generator)

    def optimizer_group(self, leaf: str) -> str | None:
        """Return the parameter group of the parameter `leaf`."""
        return "banks" if leaf in ("A", "B") else "compositions"

    @torch.no_grad()
    def keep(self, used: Tensor) -> None:
        """Drop, in place, the primitives for which `used` (n,) is False."""
        self.A = nn.Parameter(self.A[used].clone())
        self.B = nn.Parameter(self.B[used].clone())

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"n_primitives={self.n_primitives}, rank={self.rank}, d_in={self.d_in}, d_out={self.d_out}"


def banks_in(module: nn.Module) -> Iterator[tuple[str, PrimitiveBank]]:
    """Yield every bank below `module`, with its name there."""
    for name, part in module.named_modules():
        if isinstance(part, PrimitiveBank):
            yield name, part
