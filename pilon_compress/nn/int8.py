"""The rest of a model in 8 bits: attention, head and token embeddings, which PILON leaves as they are.

    Int8Linear      weight (d_out, d_in) int8, a scale per output; inputs in 8 bits per token, sums of integers
    Int8Embedding   weight (tokens, d) int8, a scale per token
    Int8Head        a linear that reads the embedding's numbers, where the two are tied

Places are named below the base model, and with a dot before them (`.lm_head`) where they belong to a head: another head
goes without.
"""

from typing import Any

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


def find(model: Any) -> dict[str, str]:
    """Return the modules that can be in int8, by place: `linear`, `embedding`, or `head` if tied to the embedding."""
    words = model.get_input_embeddings()
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if module is words and type(module) is nn.Embedding:
            found[_place(model, name)] = "embedding"
    for name, module in model.named_modules():
        if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
            tied = module.weight is words.weight
            if not tied:
                found[_place(model, name)] = "linear"
            elif type(words) is nn.Embedding:
                found[_place(model, name)] = "head"
    return found


def installed(model: Any) -> dict[str, str]:
    """Return the modules that are in int8, in the form of `find`."""
    kinds = {Int8Linear: "linear", Int8Embedding: "embedding", Int8Head: "head"}
    return {_place(model, name): kinds[type(m)] for name, m in model.named_modules() if type(m) in kinds}


def install_int8(model: Any, places: dict[str, str]) -> None:
    """Put uninitialised 8-bit layers in the `places`; those of a head that `model` does not have are passed over."""
    embedding: Int8Embedding | None = None
    for place, kind in sorted(places.items(), key=lambda item: item[1]):  # embedding before head
        root = model if place.startswith(".") else model.base_model
        name = place.removeprefix(".")
        try:
            plain: Any = root.get_submodule(name)
        except AttributeError:
            if place.startswith("."):
                continue
            raise ValueError(f"the layout names {place}, which {type(root).__name__} does not have") from None
        bias = getattr(plain, "bias", None) is not None
        made: nn.Module
        if kind == "embedding":
            tokens, width = plain.weight.shape
            made = embedding = Int8Embedding(tokens, width, plain.padding_idx, plain.weight.dtype)
        elif kind == "head":
            if embedding is None:
                raise ValueError(f"{place} is tied to an embedding that is not in 8 bits")
            made = Int8Head(embedding, bias)
        elif kind == "linear":
            rows, columns = plain.weight.shape
            d_in, d_out = (rows, columns) if type(plain).__name__ == "Conv1D" else (columns, rows)
            made = Int8Linear(d_in, d_out, bias)
        else:
            raise ValueError(f"{place} is a {kind!r}, which is not known: written by a newer pilon-compress?")
        root.set_submodule(name, made)


@torch.no_grad()
def to_int8(model: Any) -> None:
    """Round, in place, everything that `find` finds."""
    places = find(model)
    before = {place: _at(model, place) for place in places}
    install_int8(model, places)
    for place, plain in before.items():
        made = _at(model, place)
        if places[place] != "head":
            weight = plain.weight.T if type(plain).__name__ == "Conv1D" else plain.weight
            rows, made.scale = reference.int8_rows(weight.contiguous())
            made.weight.copy_(rows)
        if getattr(plain, "bias", None) is not None:
            made.bias = plain.bias


def _at(model: Any, place: str) -> Any:
    root = model if place.startswith(".") else model.base_model
    return root.get_submodule(place.removeprefix("."))


def _place(model: Any, name: str) -> str:
    if model.base_model is model:
        return name
    prefix = f"{model.base_model_prefix}."
    return name.removeprefix(prefix) if name.startswith(prefix) else f".{name}"
