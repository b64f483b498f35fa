"""Read and write the data of later cuts beside the weights: the loss of every size, and the refit of `down`.

    elastic.safetensors    tensors by block and name, a few per cent of the weights; the metadata names the projections

Losses are of the whole model, in one unit for all blocks: see `convert.allocate.budget`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pilon_compress.errors import BadInput

FILE = "elastic.safetensors"
HOW = "convert the dense model with `pilon-compress convert MODEL -o OUT --elastic`"
VERSION = 1


@dataclass(frozen=True)
class BlockWorth:
    """The worth of the neurons and components of one feed-forward block, float32, most worthy first.

    down, ups: module names below the base model   halves: outputs of an up for each neuron, 2 where gate and up are one
    loss (f + 1,): with so many neurons left, 0 with all   mean (f,): of the neurons
    variance (f,), factors (f, q): their second moment, about its mean where `down` has a bias: see `factors`
    savings: by composed projection, the loss that each component saves (r,)   means: likewise, of its inputs (d_in,)
    """

    down: str
    ups: list[str]
    halves: int
    loss: Tensor
    mean: Tensor
    variance: Tensor
    factors: Tensor
    savings: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The projections of the block."""
        return [*self.ups, self.down]


def check_keep(keep: object) -> float:
    """Return the share as a number. Raises BadInput for anything but a number above 0 and at most 1."""
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise BadInput(f"keep must be above 0 and at most 1, a share of the file's feed-forward numbers (got {keep!r})")
    return float(keep)


def write(blocks: Sequence[BlockWorth], folder: Path) -> None:
    """Write FILE into a model folder; factors in 8 bits with a scale for every neuron."""
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        scale = block.factors.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        parts = {"loss": block.loss, "mean": block.mean, "variance": block.variance, "scale": scale}
        parts |= {f"savings.{name}": values for name, values in block.savings.items()}
        parts |= {f"means.{name}": values for name, values in block.means.items()}
        tensors |= {f"{index}.{name}": tensor.float().cpu().contiguous() for name, tensor in parts.items()}
        tensors[f"{index}.factors"] = (block.factors / scale).round().to(torch.int8).cpu().contiguous()
    about = [{"down": block.down, "ups": block.ups, "halves": block.halves} for block in blocks]
    save_file(tensors, folder / FILE, {"elastic": json.dumps({"version": VERSION, "blocks": about})})


def read(file: Path) -> list[BlockWorth]:
    """Read what `write` wrote. Raises ValueError, in one line, for a file that is damaged or newer."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {})["elastic"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about["version"] > VERSION:
            raise ValueError("it is written by a newer pilon-compress")
        return [_block(entry, _below(tensors, f"{index}.")) for index, entry in enumerate(about["blocks"])]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} does not say how to cut the model: {str(error).splitlines()[0]}") from None


def _block(entry: dict[str, object], parts: dict[str, Tensor]) -> BlockWorth:
    factors = parts["factors"].float() * parts["scale"]
    count = len(factors)
    if (len(parts["loss"]), len(parts["mean"]), len(parts["variance"])) != (count + 1, count, count):
        raise ValueError("its tables have different lengths")
    return BlockWorth(
        **entry,  # type: ignore[arg-type]
        loss=parts["loss"],
        mean=parts["mean"],
        variance=parts["variance"],
        factors=factors,
        savings=_below(parts, "savings."),
        means=_below(parts, "means."),
    )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
