"""Take the integers of a model's matrices, for formats that store the same numbers without rounding them again."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.nn.formats.integer import IntegerGrid
from pilon_compress.nn.formats.quantised import QuantisedLinear
from pilon_compress.nn.installed import dense_matrices


@dataclass(frozen=True)
class Integers:
    """A matrix as codes (d_out, d_in) int8 with scales (d_out, groups) bfloat16; `group`: numbers of one (0: a row)."""

    codes: Tensor
    scale: Tensor
    bits: int
    group: int


def integer_layers(model: PreTrainedModel) -> dict[str, QuantisedLinear]:
    """Return the layers of a PILON model that hold a matrix of integers, by name below the base model."""
    found = {name: one for name, one in dense_matrices(model) if isinstance(one, QuantisedLinear)}
    return {name: one for name, one in found.items() if isinstance(one.grid, IntegerGrid)}


def integers_of(model: PreTrainedModel) -> Mapping[str, Integers]:
    """Return the matrices of integers of a PILON model, by the name of their layer in the whole model."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    return {
        f"{prefix}{name}": Integers(
            one.grid.unpack(one.weight, one.size)[0].T.contiguous(),
            one.scale[0].T.contiguous(),
            int(one.grid.bits),
            one.grid.group,
        )
        for name, one in integer_layers(model).items()
    }
