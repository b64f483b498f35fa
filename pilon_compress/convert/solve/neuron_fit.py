"""Hold the fit of a bank of whole neurons: columns, rows, and what each layer that uses them has of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pilon_compress.models.families import Site


class NeuronPart(NamedTuple):
    """A layer's own part of one projection.

    own (sources, d_in, p) or, of down, (1, p, d_out): the p neurons of the bank that no other layer uses
    scale (k,): that of every neuron; empty for a projection without scales
    """

    own: Tensor
    scale: Tensor


class LayerStart(NamedTuple):
    """A layer's use of the bank as fitted in the dense model's own stream.

    slots (k,): neurons of the bank, ascending   own (k,): True for those that no other layer uses
    scale (k,): behind the activation   mean (k,): of the activation   power (k,): of what each neuron puts out
    target (d_out,): mean of what the block is to put out
    """

    slots: Tensor
    own: Tensor
    scale: Tensor
    mean: Tensor
    power: Tensor
    target: Tensor


@dataclass(frozen=True)
class NeuronFit:
    """The fit of one bank, float64.

    columns (d_in, N) by source, `up` and of gated blocks `gate`   rows (N, d_out)   starts: by layer
    """

    columns: dict[str, Tensor]
    rows: Tensor
    starts: dict[int, LayerStart]

    def pack(self) -> dict[str, Tensor]:
        """Return all of it as tensors by name, for the journal."""
        found = {"rows": self.rows} | {f"columns.{source}": tensor for source, tensor in self.columns.items()}
        for layer, start in self.starts.items():
            found |= {f"layer.{layer}.{name}": tensor for name, tensor in start._asdict().items()}
        return found

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> "NeuronFit":
        """Read what `pack` returned."""
        columns = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith("columns.")}
        layers = sorted({int(key.split(".")[1]) for key in tensors if key.startswith("layer.")})
        starts = {
            layer: LayerStart(**{name: tensors[f"layer.{layer}.{name}"] for name in LayerStart._fields})
            for layer in layers
        }
        return cls(columns, tensors["rows"], starts)

    def approximation(self, site: Site, part: NeuronPart) -> Tensor:
        """Return the matrix (d_in, d_out) that the site computes with, the scale folded in."""
        start = self.starts[site.layer]
        if site.role == "down":
            rows = self.rows[start.slots]
            rows[start.own] = part.own[0].to(rows)
            return part.scale[:, None] * rows
        found = []
        for source, own in zip(sources(site), part.own, strict=True):
            columns = self.columns[source][:, start.slots]
            columns[:, start.own] = own.to(columns)
            found.append(columns)
        if len(part.scale):
            found[0] = found[0] * part.scale
        return torch.cat(found, 1)

    def completed(self, parts: Mapping[str, NeuronPart], sites: Mapping[str, Site]) -> "NeuronFit":
        """Return the fit with the columns and rows that layers have of their own, by site name."""
        columns, rows = {source: tensor.clone() for source, tensor in self.columns.items()}, self.rows.clone()
        for name, part in parts.items():
            start = self.starts[sites[name].layer]
            own = start.slots[start.own]
            if sites[name].role == "down":
                rows[own] = part.own[0].to(rows)
            else:
                for source, tensor in zip(sources(sites[name]), part.own, strict=True):
                    columns[source][:, own] = tensor.to(rows)
        return NeuronFit(columns, rows, self.starts)


def sources(site: Site) -> tuple[str, ...]:
    """Return the bank's matrices that an up-like site multiplies with, in the order of its outputs."""
    return ("gate", "up") if site.role == "gate_up" else (site.role,)
