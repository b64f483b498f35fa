"""Tiered banks: a bank's hot primitives on the device, all of them in a memory-mapped file (pinned memory for a GPU).

    hot_A, hot_B     (n_hot, ...)  parameters on the device: with gradients and optimiser states, where they train
    table            (n, ...)      every primitive; rows of hot ones are old while these train

A call puts the selected primitives together in the order of the resident bank, so that the same numbers go through the
same products: results are equal, bit for bit. When the first bank of a band is called, the file's pages of the band
before it are given back, and those of the band behind it are read ahead (on a GPU: copied, on a stream of its own).

A tier is a way to run a model, not a format: `state_dict` has the tensors of the resident bank.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from pilon_compress.errors import BadInput
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.dense_linear import DenseLinear
from pilon_compress.nn.extended import extend
from pilon_compress.nn.installed import neuron_blocks, projections
from pilon_compress.nn.layout import BANKS, Host, Layout
from pilon_compress.nn.lazy import LazyValue
from pilon_compress.nn.neuron_bank import NeuronBank
from pilon_compress.nn.usage import used_neurons
from pilon_compress.tiers.table import Table

HOT = "hot_"  # before the name of a tensor: its hot rows


class Bands:
    """The tiered parts of a model by band, in the order of their first use."""

    def __init__(self) -> None:
        self.parts: list[list[Tiered]] = []
        self.current = -1

    def enter(self, band: int, device: torch.device) -> None:
        """Give back the memory of the band that was computed last, and read the one behind `band` ahead."""
        if band == self.current:
            return
        for part in self.parts[self.current] if self.current >= 0 else ():
            part.release()
        self.current = band
        for part in self.parts[(band + 1) % len(self.parts)]:
            part.read_ahead(device)


class Rows(NamedTuple):
    """Places of chosen rows: of hot ones `to` the result `at` their slots, of cold ones likewise from the table."""

    hot_to: Tensor
    hot_at: Tensor
    cold_to: Tensor
    cold_at: Tensor


class Tiered(nn.Module):
    """Mixin of a bank or matrix whose tensors are in tiers. `hot` (n_hot,): the hot rows, in the order of the slots."""

    hot: Tensor
    tables: dict[str, Table]
    axes: dict[str, int]

    def taken(self, leaf: str, chosen: Tensor | None = None) -> Tensor:
        """Return the `chosen` rows (k,) of the tensor `leaf`, None: all, as the resident module holds them."""
        hot, axis, table = getattr(self, HOT + leaf), self.axes[leaf], self.tables[leaf]
        bands: Bands = self.__dict__["bands"]
        bands.enter(self.__dict__["band"], hot.device)
        rows = self._rows(chosen)
        shape = list(hot.shape)
        shape[axis] = len(rows.hot_to) + len(rows.cold_to)
        found: Tensor = hot.new_empty(shape)
        found.index_copy_(axis, rows.cold_to, table.rows(axis, rows.cold_at, hot.device).to(hot.dtype))
        return found.index_copy_(axis, rows.hot_to, hot.index_select(axis, rows.hot_at))

    def _rows(self, chosen: Tensor | None) -> Rows:
        selection = self.__dict__["every"] if chosen is None else chosen
        known = self.__dict__["places"]  # as long as a selection lives: some are made anew for every call
        if selection not in known:
            known[selection] = LazyValue()
        found: Rows = known[selection].get((self.hot, selection), lambda: self._places(selection.cpu()))
        return found

    def _places(self, chosen: Tensor) -> Rows:
        slots = torch.full_like(self.__dict__["every"], -1).index_copy(0, self.hot.cpu(), torch.arange(len(self.hot)))[
            chosen
        ]
        hot_to, cold_to = (slots >= 0).nonzero()[:, 0], (slots < 0).nonzero()[:, 0]
        device = self.hot.device
        return Rows(hot_to.to(device), slots[hot_to].to(device), cold_to.to(device), chosen[cold_to])

    def read_ahead(self, device: torch.device) -> None:
        """Begin to read the tables."""
        for table in self.tables.values():
            table.read_ahead(device)

    def release(self) -> None:
        """Give back the memory that reading the tables took."""
        for table in self.tables.values():
            table.release()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        for leaf in (*self._parameters, *self._buffers):
            if leaf in ("hot", "use") or leaf.startswith((HOT, "table_")):
                destination.pop(prefix + leaf, None)
        for leaf in self.axes:
            destination[prefix + leaf] = self.taken(leaf).detach()


class TieredBank(Tiered):
    """A `PrimitiveBank` in tiers."""

    A = property(lambda self: self.taken("A"))
    B = property(lambda self: self.taken("B"))

    n_primitives = property(lambda self: self.tables["A"].values.shape[0])
    d_in = property(lambda self: self.tables["A"].values.shape[1])
    rank = property(lambda self: self.tables["A"].values.shape[2])
    d_out = property(lambda self: self.tables["B"].values.shape[2])

    def primitives(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the selected A (k, d_in, r) and B (k, r, d_out)."""
        return self.taken("A", selected), self.taken("B", selected)

    def optimizer_group(self, leaf: str) -> str | None:
        """Return the parameter group of the parameter `leaf`: that of the resident bank's."""
        return "banks" if leaf.startswith(HOT) else "compositions"

    def keep(self, used: Tensor) -> None:
        """Refuse: what is not used is dropped from the resident bank."""
        raise TypeError("a tiered bank drops no primitives")

    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Refuse: weights are drawn before they are in tiers."""
        raise TypeError("a tiered bank draws no weights")


class TieredMatrix(Tiered):
    """A matrix of a `NeuronBank`, a `DenseLinear`, in tiers."""

    weight = property(lambda self: self.taken("weight"))

    def draw(self, std: float, generator: torch.Generator | None) -> None:
        """Refuse: weights are drawn before they are in tiers."""
        raise TypeError("a tiered matrix draws no weights")


def gradient_of(module: Any, leaf: str) -> Tensor | None:
    """Return the gradient of the tensor `leaf` of a bank or matrix, zero for what is cold; None where there is none."""
    if not isinstance(module, Tiered):
        own: Tensor | None = module.get_parameter(leaf).grad
        return own
    gradient = module.get_parameter(HOT + leaf).grad
    if gradient is None:
        return None
    shape, axis = module.tables[leaf].values.shape, module.axes[leaf]
    return gradient.new_zeros(shape).index_copy(axis, module.hot, gradient)


class Place(NamedTuple):
    """A module of a bank that can be in tiers: its `name` in the model, tensors with the axis of their primitives."""

    name: str
    module: nn.Module
    band: str
    primitives: int
    axes: dict[str, int]


def places(model: Host) -> list[Place]:
    """Return what can be in tiers: banks of floats with two primitives or more, in the order of their first use."""
    names = {id(module): name for name, module in model.named_modules()}
    users = [layer.bank for _, layer in projections(model)] + [block["down"].bank for block in neuron_blocks(model)]
    found: list[Place] = []
    for bank in dict.fromkeys(users):
        band = names[id(bank)].rpartition(f"{BANKS}.")[2]
        if isinstance(bank, PrimitiveBank) and bank.format == "none" and bank.n_primitives > 1:
            folder = band.rpartition(".")[0] or band
            found.append(Place(names[id(bank)], bank, folder, bank.n_primitives, {"A": 0, "B": 0}))
        elif isinstance(bank, NeuronBank) and bank.format == "none" and bank.neurons > 1:
            for role, matrix in bank.matrices():
                axes = {"weight": 1 if role == "down" else 0}
                assert isinstance(matrix, DenseLinear)
                found.append(Place(names[id(matrix)], matrix, band, bank.neurons, axes))
    return found


def hot_count(n_hot: float, primitives: int) -> int:
    """Return how many of a bank's primitives are hot: the share `n_hot` of them, one at least."""
    return max(1, round(n_hot * primitives))


def uses(model: Host) -> dict[str, Tensor]:
    """By name of a `Place`: what the layers make of each of its primitives (n,), the sum of squared weights."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}
    for _, layer in projections(model):
        share = layer.spread().square().sum(1).cpu()
        name = names[id(layer.bank)]
        found[name] = found.get(name, torch.zeros_like(share)) + share
    for block in neuron_blocks(model):
        used = used_neurons(block).float()
        for role in block["down"].bank.shapes():
            name = f"{names[id(block['down'].bank)]}.{role}"
            found[name] = found.get(name, torch.zeros_like(used)) + used
    return found


def tiers_of(layout: Layout, n_hot: float) -> tuple[int, int]:
    """Count the hot and cold primitives of a model in tiers, from its layout. Raises BadInput where none is cold."""
    banks = {name: spec.n_primitives for name, spec in layout.banks.items() if spec.quantization == "none"}
    banks |= {name: spec.neurons for name, spec in layout.neuron_banks.items() if spec.quantization == "none"}
    check_cold(n_hot, list(banks.values()))
    hot = {name: min(count, hot_count(n_hot, count)) for name, count in banks.items()}
    return sum(hot.values()), sum(banks.values()) - sum(hot.values())


def check_cold(n_hot: float, primitives: Sequence[int]) -> None:
    """Raise BadInput for banks of so many `primitives` each of which none would be cold."""
    if max(primitives, default=1) < 2:
        kinds = "banks of floats with two primitives or more"
        raise BadInput(f"the model has nothing to put in tiers: tiers are for {kinds} (docs/tiers.md)")
    if all(hot_count(n_hot, count) >= count for count in primitives):
        raise BadInput(f"n_hot {n_hot:g} leaves nothing cold: the largest bank has {max(primitives)} primitives")


def to_tier(model: Host, n_hot: float) -> list[Place]:
    """Return the places that the share `n_hot` of hot primitives leaves cold ones in. Raises BadInput for none."""
    found = places(model)
    check_cold(n_hot, [place.primitives for place in found])
    return [place for place in found if hot_count(n_hot, place.primitives) < place.primitives]


@torch.no_grad()
def put_in_tiers(
    model: Host, found: Iterable[Place], n_hot: float, tables: Mapping[str, Table], dtype: torch.dtype | None = None
) -> list[Tiered]:
    """Put the places `found` in tiers, in place; return their modules. The most used primitives are hot.

    tables: by name of the tensor in the model   dtype: of hot rows, by default the table's
    """
    bands, homes, made = Bands(), dict[str, int](), list[Tiered]()
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    for place in found:
        part: Any = place.module
        for leaf in place.axes:
            part._parameters.pop(leaf, None)
        extend(part, TieredBank if isinstance(part, PrimitiveBank) else TieredMatrix)
        part.tables, part.axes = {leaf: tables[f"{place.name}.{leaf}"] for leaf in place.axes}, place.axes
        band = homes.setdefault(place.band, len(homes))
        bands.parts += [[] for _ in range(band + 1 - len(bands.parts))]
        bands.parts[band].append(part)
        every, known = torch.arange(place.primitives), WeakTensorKeyDictionary()
        part.__dict__.update(bands=bands, band=band, every=every, places=known)
        made.append(part)
    used = uses(model)
    for place, part in zip(found, made, strict=True):
        count = hot_count(n_hot, place.primitives)
        hot = used[place.name].argsort(descending=True, stable=True)[:count].sort().values
        for leaf, axis in place.axes.items():
            rows = part.tables[leaf].values.index_select(axis, hot)
            part.register_parameter(HOT + leaf, nn.Parameter(rows.to(device, dtype or rows.dtype)))
            part.tables[leaf].release()
        part.register_buffer("hot", hot.to(device))
    return made
