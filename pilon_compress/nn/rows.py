"""Layers of integer rows, which take activations as they are: for attention, head and embeddings (`nn.rest`).

    RowLinear      weight (d_out, bytes) uint8, scale (d_out, groups) bfloat16: the codes of each row of a matrix
    RowEmbedding   the same for (tokens, d)
    RowHead        a linear that reads the embedding's numbers, where the two are tied

The rows' grid is that of a format of `nn.formats`, such as int4.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pilon_compress.nn.formats.quantised import Products, Run, products
from pilon_compress.nn.formats.registry import Grid
from pilon_compress.nn.lazy import LazyValue
from pilon_compress.nn.part import Part

ROWS = 4096  # that are rounded at a time


class Rows(Part, nn.Module):
    """A matrix (rows, d) of codes. The bytes are a parameter, because transformers shares parameters of tied layers."""

    weight: Tensor
    scale: Tensor

    def __init__(self, rows: int, d: int, grid: Grid) -> None:
        super().__init__()
        self.width, self.grid = d, grid
        codes = torch.empty((rows, grid.size(d, 1)[0]), dtype=grid.stored_dtype)
        self.register_parameter("weight", nn.Parameter(codes, requires_grad=False))
        self.register_buffer("scale", torch.empty((rows, grid.groups(d)), dtype=torch.bfloat16))

    def codes(self) -> Tensor:
        """Return the codes (rows, d)."""
        return self.grid.unpack(self.weight, (self.width, 1))[:, :, 0]

    def values(self, ids: Tensor | None = None) -> Tensor:
        """Return the numbers as they count, (rows, d) or those of the rows `ids` (n,), float32."""
        weight, scale = self.weight, self.scale
        if ids is not None:
            weight, scale = weight.index_select(0, ids), scale.index_select(0, ids)
        codes = self.grid.unpack(weight, (self.width, 1)).float()
        return (codes * self.grid.spread(scale.float()[:, :, None], self.width))[:, :, 0]

    @torch.no_grad()
    def put(self, weight: Tensor) -> None:
        """Round `weight` (rows, d) to the nearest codes, with the scales of least squared error."""
        for start in range(0, len(weight), ROWS):
            part = weight[start : start + ROWS, :, None].float()
            scale = self.grid.scales(part)
            codes = self.grid.nearest(part / self.grid.spread(scale.float(), self.width)).to(self.grid.code_dtype)
            self.weight[start : start + ROWS] = self.grid.pack(codes)
            self.scale[start : start + ROWS] = scale[:, :, 0]

    def own_types(self) -> dict[str, torch.dtype]:
        """Return the tensors that keep their dtype when a model is cast: the scales."""
        return {"scale": torch.bfloat16}

    def refuse(self) -> str | None:
        """Return why codes or scales are damaged; None if they are sound."""
        if not (torch.isfinite(self.scale).all() and self.scale.all()):
            return "holds scales that are zero or not finite"
        return self.grid.refuse(self.weight)


class RowProduct:
    """The product of activations with `Rows`: by a kernel, from codes that are packed once, or in plain torch."""

    def __init__(self) -> None:
        self._run: LazyValue[Run] = LazyValue()

    def __call__(self, x: Tensor, rows: Rows, bias: Tensor | None) -> Tensor:
        """Compute `x` (..., d) -> (..., rows), in the dtype of `x`."""
        kernels = products(rows.grid, x)
        if kernels is None:
            return functional.linear(x, rows.values().to(x.dtype), bias)
        tensors = (rows.weight, rows.scale) if bias is None else (rows.weight, rows.scale, bias)
        return self._run.get(tensors, _maker(kernels, rows, bias))(x)


def _maker(kernels: Products, rows: Rows, bias: Tensor | None) -> Callable[[], Run]:
    return lambda: kernels.linear(rows.codes().T[None], rows.scale.T[None], rows.grid, bias)


class RowLinear(Rows):
    """`x` (..., d_in) -> (..., d_out)."""

    def __init__(self, d_in: int, d_out: int, bias: bool, grid: Grid) -> None:
        super().__init__(d_out, d_in, grid)
        self.in_features, self.out_features = d_in, d_out
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self._product = RowProduct()

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x` (..., d_in) -> (..., d_out)."""
        return self._product(x, self, self.bias)


class RowEmbedding(Rows):
    """Ids (...) -> their rows (..., d), in the dtype of `like`, a parameter of the model that is computed in."""

    like: Tensor

    def __init__(self, tokens: int, width: int, padding: int | None, dtype: torch.dtype, grid: Grid) -> None:
        super().__init__(tokens, width, grid)
        self.num_embeddings, self.embedding_dim, self.padding_idx = tokens, width, padding
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., d) of token ids (...)."""
        return self.values(ids.flatten()).to(self.like.dtype).view(*ids.shape, self.width)


class RowHead(Part, nn.Module):
    """A head that is tied to the token embedding: it borrows the scales as transformers shares the codes."""

    embedding: RowEmbedding

    def __init__(self, embedding: RowEmbedding, bias: bool) -> None:
        super().__init__()
        object.__setattr__(self, "embedding", embedding)  # not registered: the scales are in the file once
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings)) if bias else None
        self._product = RowProduct()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of hidden states (..., d)."""
        return self._product(x, self.embedding, self.bias)
