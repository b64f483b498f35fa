"""Tiers of a model that trains: hot primitives learn; cold ones rest in files, with their optimiser states.

use         mean over steps, decaying by DECAY, of  Σ_layers |g · ∂L/∂g|  over a primitive's coefficients g: how the
            loss would change without it, to first order (Molchanov et al., 2019); cold primitives have it, too
promotion   every so many steps a cold primitive takes the place of a hot one where its use is larger by a margin,
            so that two of like use do not change places again and again (hysteresis)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pilon_compress.config.tiers import TrainingTier
from pilon_compress.errors import BadInput
from pilon_compress.nn.installed import neuron_blocks, projections
from pilon_compress.nn.layout import Host
from pilon_compress.nn.neuron_linear import NeuronLinear
from pilon_compress.optimize.callbacks import Callback
from pilon_compress.optimize.checkpoints import ready
from pilon_compress.results.training import TrainedTiers
from pilon_compress.tiers.modules import HOT, Tiered, put_in_tiers, to_tier
from pilon_compress.tiers.table import Table

DECAY = 0.9


@torch.no_grad()
def begin_tiers(model: Host, n_hot: float, folder: Path) -> None:
    """Put the banks of a model that will train in tiers, in place, with the cold primitives in files in `folder`.

    Tables are buffers of the model: checkpoints hold them like anything else. Raises BadInput where nothing goes.
    """
    found, tables = to_tier(model, n_hot), dict[str, Table]()
    for place in found:
        for leaf in place.axes:
            weight = place.module.get_parameter(leaf)
            table = Table.new(folder / f"{place.name}.{leaf}", weight.dtype, weight.shape)
            table.values.copy_(weight)
            table.release()
            tables[f"{place.name}.{leaf}"] = table
            del weight, place.module._parameters[leaf]
    for part in put_in_tiers(model, found, n_hot, tables):
        for leaf, axis in part.axes.items():
            part.register_buffer("use", torch.zeros(part.tables[leaf].values.shape[axis]))
            part.register_buffer(f"table_{leaf}", part.tables[leaf].values)


class Promotion(Callback):
    """Follows the use of every primitive, and lets cold ones take the places of hot ones; optimiser states move along.

    model: in tiers, see `begin_tiers`   folder: of the files of resting optimiser states
    """

    def __init__(self, model: Host, optimizers: Sequence[Optimizer], asked: TrainingTier, folder: Path) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        self.asked, self.step, self.promoted = asked, 0, 0
        self.factors = [layer for _, layer in projections(model) if isinstance(layer.bank, Tiered)]
        self.blocks: list[tuple[dict[str, NeuronLinear], list[Any]]] = [
            (block, [block["down"].bank.matrix(role) for role in block["down"].bank.shapes()])
            for block in neuron_blocks(model)
            if isinstance(block["down"].bank.matrix("down"), Tiered)
        ]
        if any(not block["down"].scaled for block, _ in self.blocks):
            raise BadInput("tiers go by the scales of neurons, which this model has not: leave --tier out")
        homes = {id(p): one for one in optimizers for group in one.param_groups for p in group["params"]}
        self.parts: list[Any] = [part for part in model.modules() if isinstance(part, Tiered)]
        self.states: dict[int, dict[str, tuple[Optimizer, dict[str, Table]]]] = {}
        for part in self.parts:
            own = self.states[id(part)] = {}
            for leaf in part.axes:
                hot = part.get_parameter(HOT + leaf)
                if id(hot) not in homes:
                    raise BadInput("tiers are of banks that learn, and run.train holds them: leave --tier out")
                optimizer, shape = homes[id(hot)], part.tables[leaf].values.shape
                resting = {
                    key: Table.new(folder / f"{names[id(part)]}.{leaf}.{key}", value.dtype, shape)
                    for key, value in ready(optimizer, hot).items()
                    if value.shape == hot.shape
                }
                for key, table in resting.items():
                    part.register_buffer(f"table_{leaf}_{key}", table.values)
                own[leaf] = optimizer, resting

    @property
    def told(self) -> TrainedTiers:
        """Return the figures for the result."""
        leads = [part for part in self.parts if part.axes.get("weight") != 0]  # down for the matrices of a neuron bank
        hot, total = (sum(part.get_buffer(name).numel() for part in leads) for name in ("hot", "use"))
        return TrainedTiers(n_hot=self.asked.n_hot, hot=hot, cold=total - hot, promoted=self.promoted)

    def before(self, step: int, share: float) -> None:
        """Note the step."""
        self.step = step

    @contextmanager
    def around(self) -> Iterator[None]:
        """Follow the use by the gradients of this step; after it, promote if it is time."""
        for part, use in self._uses():
            part.use.mul_(DECAY).add_(use.to(part.use.device), alpha=1 - DECAY)
        yield
        if (self.step + 1) % self.asked.every == 0:
            for part in self.parts:
                self.promoted += self._promote(part)

    @torch.no_grad()
    def _uses(self) -> list[tuple[Any, Tensor]]:
        """Return each tiered part with the use (n,) of its primitives by the gradients of this step."""
        found: dict[int, tuple[Any, Tensor]] = {}
        for layer in self.factors:
            if layer.weight.grad is not None:
                worth = (layer.weight * layer.weight.grad).abs().sum(-1)
                _add(found, layer.bank, layer.selected.expand(worth.shape), worth)
        for block, parts in self.blocks:
            down = block["down"]
            if down.weight.grad is None:
                continue
            worth = (down.weight * down.weight.grad).abs()
            every = torch.arange(parts[0].use.numel(), device=worth.device)
            places = every if down.selection is None else down.selection.selected
            for part in parts:
                _add(found, part, places.expand(worth.shape), worth)
        return list(found.values())

    @torch.no_grad()
    def _promote(self, part: Any) -> int:
        """Let the most used cold primitives take the places of the least used hot ones; return how many do."""
        use, hot = part.use.cpu(), part.hot.cpu()
        cold = torch.ones(len(use), dtype=torch.bool).index_fill(0, hot, False).nonzero()[:, 0]
        rising = cold[use[cold].argsort(descending=True, stable=True)]
        falling = use[hot].argsort(stable=True)  # slots
        count = min(len(rising), len(falling))
        better = use[rising[:count]] > (1 + self.asked.margin) * use[hot[falling[:count]]]
        count = int(better.long().cumprod(0).sum())
        if count == 0:
            return 0
        slots, new, old = falling[:count], rising[:count], hot[falling[:count]]
        for leaf, axis in part.axes.items():
            parameter = part.get_parameter(HOT + leaf)
            optimizer, resting = self.states[id(part)][leaf]
            _swap(parameter, part.tables[leaf], axis, slots, old, new)
            for key, table in resting.items():
                _swap(optimizer.state[parameter][key], table, axis, slots, old, new)
        part.hot.index_copy_(0, slots.to(part.hot.device), new.to(part.hot.device))
        return count


def _add(found: dict[int, tuple[Any, Tensor]], part: Any, places: Tensor, worth: Tensor) -> None:
    _, use = found.setdefault(id(part), (part, torch.zeros(part.use.numel(), device=worth.device)))
    use.index_add_(0, places.flatten(), worth.flatten().float())


def _swap(held: Tensor, table: Table, axis: int, slots: Tensor, old: Tensor, new: Tensor) -> None:
    """Write the rows in `slots` to the places `old` of the table, and read the places `new` into them."""
    slots = slots.to(held.device)
    table.values.index_copy_(axis, old, held.index_select(axis, slots).to(table.values))
    held.index_copy_(axis, slots, table.values.index_select(axis, new).to(held))
    table.release()
