"""Layers of 8-bit rows, which take 8-bit activations: for attention, head and embeddings (`nn.rest`).

Int8Linear      weight (d_out, d_in) int8, a scale per output; inputs in 8 bits per token, sums of integers
Int8Embedding   weight (tokens, d) int8, a scale per token
Int8Head        a linear that reads the embedding's numbers, where the two are tied
"""

import torch
from torch import Tensor, nn

from pilon_compress.kernels import cpu, integers, reference
from pilon_compress.kernels.integer_layout import int8_tiles
from pilon_compress.nn.lazy import LazyValue
from pilon_compress.nn.part import Part


class Int8Layer(Part):
    """A layer with a scale for every row of its weight."""

    scale: Tensor

    def own_types(self) -> dict[str, torch.dtype]:
        """Return the tensors that keep their dtype when a model is cast: the scales."""
        return {"scale": torch.float32}

    def refuse(self) -> str | None:
        """Return why the scales are damaged; None if they are sound."""
        sound = torch.isfinite(self.scale).all() and self.scale.all()
        return None if sound else "holds scales that are zero or not finite"


class Int8Product:
    """The product with 8-bit rows: by the CPU kernel, from tiles that are made once, or in plain torch."""

    def __init__(self) -> None:
        self._run: LazyValue[integers.Run] = LazyValue()

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Compute `reference.int8_linear`, in the dtype of `x`."""
        scale = scale.float()
        if x.device.type == "cpu" and cpu.available():
            tensors = (weight, scale) if bias is None else (weight, scale, bias)
            return self._run.get(tensors, lambda: integers.int8(int8_tiles(weight), scale, _detached(bias)))(x)
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype == torch.float32:
                return reference.int8_linear(x.contiguous(), weight, scale, None if bias is None else bias.float())
            # in a narrower dtype the bias is added after rounding, as a torch layer does
            y = reference.int8_linear(x.float().contiguous(), weight, scale).to(x.dtype)
            return y if bias is None else y + bias.to(x.dtype)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


class Int8Linear(Int8Layer, nn.Module):
    """`x` (..., d_in) -> (..., d_out)."""

    scale: Tensor

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = _whole(d_out, d_in)
        self.register_buffer("scale", torch.empty(d_out, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self._product = Int8Product()

    def forward(self, x: Tensor) -> Tensor:
        """Compute `x` (..., d_in) -> (..., d_out)."""
        return self._product(x, self.weight, self.scale, self.bias)


class Int8Embedding(Int8Layer, nn.Module):
    """Ids (...) -> their rows (..., d), in the dtype of `like`, a parameter of the model that is computed in."""

    scale: Tensor
    like: Tensor

    def __init__(self, tokens: int, width: int, padding: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = tokens, width, padding
        self.weight = _whole(tokens, width)
        self.register_buffer("scale", torch.empty(tokens, dtype=torch.float32))
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings (..., d) of token ids (...)."""
        rows = nn.functional.embedding(ids, self.weight).float()
        return (rows * nn.functional.embedding(ids, self.scale.float()[:, None])).to(self.like.dtype)


class Int8Head(Part, nn.Module):
    """A head that is tied to the token embedding: it borrows the scales as transformers shares the numbers."""

    def __init__(self, embedding: Int8Embedding, bias: bool) -> None:
        super().__init__()
        object.__setattr__(self, "embedding", embedding)  # not registered: the scales are in the file once
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings)) if bias else None
        self._product = Int8Product()

    embedding: Int8Embedding

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of hidden states (..., d)."""
        return self._product(x, self.weight, self.embedding.scale, self.bias)


def _whole(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty((rows, columns), dtype=torch.int8), requires_grad=False)
