"""The rest of a model, which PILON leaves as it is, in integers: attention, head and token embeddings.

    int8   rows of 8 bits, and activations of 8 bits (`nn.int8`)
    int4   rows of 4 bits with a scale for 64 weights, and activations as they are (`nn.rows`)

Places are named below the base model, and with a dot before them (`.lm_head`) where they belong to a head: another head
goes without. Kinds are `linear`, `embedding`, and `head` if tied to the embedding, for int8; `linear-int4` and so on
for int4.
"""

from typing import Any

import torch
from torch import nn

from pilon_compress.kernels import reference
from pilon_compress.nn.formats.registry import grid_of
from pilon_compress.nn.int8 import Int8Embedding, Int8Head, Int8Linear
from pilon_compress.nn.rows import RowEmbedding, RowHead, RowLinear

KINDS: dict[type[nn.Module], str] = {
    Int8Linear: "linear",
    Int8Embedding: "embedding",
    Int8Head: "head",
    RowLinear: "linear",
    RowEmbedding: "embedding",
    RowHead: "head",
}


def find(model: Any) -> dict[str, str]:
    """Return the modules that can be in integers, by place: `linear`, `embedding`, or `head` if tied to that."""
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
    """Return the modules that are in integers, by place, with their kinds."""
    found = {}
    for name, module in model.named_modules():
        if type(module) in KINDS:
            rows = module.embedding if isinstance(module, RowHead) else module
            suffix = f"-{_format(rows.grid)}" if isinstance(rows, RowLinear | RowEmbedding) else ""
            found[_place(model, name)] = KINDS[type(module)] + suffix
    return found


def install_rest(model: Any, places: dict[str, str]) -> None:
    """Put uninitialised integer layers in the `places`; those of a head that `model` does not have are passed over."""
    embedding: Int8Embedding | RowEmbedding | None = None
    for place, kind in sorted(places.items(), key=lambda item: item[1]):  # embedding before head
        root = model if place.startswith(".") else model.base_model
        name = place.removeprefix(".")
        try:
            plain: Any = root.get_submodule(name)
        except AttributeError:
            if place.startswith("."):
                continue
            raise ValueError(f"the layout names {place}, which {type(root).__name__} does not have") from None
        layer, _, number = kind.partition("-")
        if layer == "embedding":
            embedding = _embedding(plain, number)
        elif layer == "head" and embedding is None:
            raise ValueError(f"{place} is tied to an embedding that is not in integers")
        made = embedding if layer == "embedding" else _linear(plain, number, embedding if layer == "head" else None)
        root.set_submodule(name, made)


def _embedding(plain: Any, number: str) -> Int8Embedding | RowEmbedding:
    tokens, width = plain.weight.shape
    about = (plain.padding_idx, plain.weight.dtype)
    return RowEmbedding(tokens, width, *about, grid_of(number)) if number else Int8Embedding(tokens, width, *about)


def _linear(plain: Any, number: str, tied: Int8Embedding | RowEmbedding | None) -> nn.Module:
    """Return a layer in the place of the linear `plain`; one that is `tied` borrows the numbers of an embedding."""
    bias = getattr(plain, "bias", None) is not None
    if isinstance(tied, RowEmbedding):
        return RowHead(tied, bias)
    if tied is not None:
        return Int8Head(tied, bias)
    rows, columns = plain.weight.shape
    d_in, d_out = (rows, columns) if type(plain).__name__ == "Conv1D" else (columns, rows)
    return RowLinear(d_in, d_out, bias, grid_of(number)) if number else Int8Linear(d_in, d_out, bias)


@torch.no_grad()
def round_rest(model: Any, number: str) -> None:
    """Round, in place, everything that `find` finds to `number`: int8 or int4."""
    suffix = "" if number == "int8" else f"-{number}"
    places = {place: kind + suffix for place, kind in find(model).items()}
    before = {place: _at(model, place) for place in places}
    install_rest(model, places)
    for place, plain in before.items():
        made = _at(model, place)
        if not places[place].startswith("head"):
            weight = (plain.weight.T if type(plain).__name__ == "Conv1D" else plain.weight).contiguous()
            if number == "int8":
                rows, made.scale = reference.int8_rows(weight)
                made.weight.copy_(rows)
            else:
                made.put(weight)
        if getattr(plain, "bias", None) is not None:
            made.bias = plain.bias


def _format(grid: Any) -> str:
    return f"int{grid.bits}"


def _at(model: Any, place: str) -> Any:
    root = model if place.startswith(".") else model.base_model
    return root.get_submodule(place.removeprefix("."))


def _place(model: Any, name: str) -> str:
    if model.base_model is model:
        return name
    prefix = f"{model.base_model_prefix}."
    return name.removeprefix(prefix) if name.startswith(prefix) else f".{name}"
