"""Describe a block of a layer for conversion: dense weights, metrics, and of a feed-forward one remaining neurons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from pilon_compress.convert.calibrate.second_moments import Moments
from pilon_compress.convert.plan import BankPlan, blocks_of, down_of
from pilon_compress.convert.solve.low_rank import Target, damped, factor
from pilon_compress.convert.solve.neuron_pruning import Elimination, eliminate, refit
from pilon_compress.models.families import Site
from pilon_compress.models.source import Source
from pilon_compress.nn.targets import Target as Kind


@dataclass(frozen=True)
class FeedForward:
    """The projections of one layer's feed-forward block that are replaced, with tensors in float64 by `Site.name`.

    Or those of its attention, where no neurons can go.

    weights (d_in, d_out)   biases (d_out,)   means (d_in,) of the inputs
    metrics (d_in, d_in): damped moments of the inputs   gradients (d_out, d_out): damped ones of the output gradients
    """

    layer: int
    sites: list[Site]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    metrics: dict[str, Tensor]
    means: dict[str, Tensor]
    gradients: dict[str, Tensor]
    _roots: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, prefix: str, layer: int, sites: Sequence[Site], moments: Moments) -> "FeedForward":
        """Take the projections `sites` of the transformer block `module`, whose name is `prefix`, and their moments."""
        made = cls(layer, list(sites), {}, {}, {}, {}, {})
        shared: dict[str, Tensor] = {}  # gate and up have one metric
        for site in sites:
            linear = module.get_submodule(site.name.removeprefix(f"{prefix}."))
            made.weights[site.name] = dense_weight(linear)
            if site.bias:
                made.biases[site.name] = linear.get_parameter("bias").detach().double()
            moment = moments.input(site)
            key = _metric_key(site)
            if key not in shared:
                shared[key] = damped(moment.covariance() if site.bias else moment.second_moment())
            made.metrics[site.name] = shared[key]
            made.means[site.name] = moment.mean.double()
            made.gradients[site.name] = damped(moments.gradient(site))
        return made

    @cached_property
    def down(self) -> Site | None:
        """The projection that reads the block's neurons; None where neurons cannot be dropped."""
        return down_of(self.sites)

    @cached_property
    def elimination(self) -> Elimination | None:
        """The order in which neurons go; None where none can."""
        if self.down is None:
            return None
        name = self.down.name
        return eliminate(self.weights[name], self.metrics[name], self.gradients[name])

    def columns(self, site: Site, left: Tensor) -> Tensor:
        """Return the outputs of an up-like site that belong to the neurons `left`; a fused gate_up has two for each."""
        assert self.down is not None
        halves = torch.arange(site.d_out // self.down.d_in, device=left.device)[:, None] * self.down.d_in
        return (halves + left).flatten()

    def target(self, site: Site, left: Tensor | None) -> Target:
        """Return the site's least-squares target in the dense model's own stream, with the neurons `left`."""
        name = site.name
        weight, metric, gradient = self.weights[name], self.metrics[name], self.gradients[name]
        if left is not None and site == self.down:
            weight, metric = refit(weight, metric, left), metric[left][:, left]
        elif left is not None:
            columns = self.columns(site, left)
            weight, gradient = weight[:, columns], gradient[columns][:, columns]
        down, wide = site == self.down, weight.shape[0] <= weight.shape[1]
        whole_metric, whole_gradient = left is None or not down, left is None or down
        return Target(
            *(name, site.layer, weight, metric, gradient),
            metric_root=self.metric_root(site) if wide and whole_metric else None,
            gradient_root=self.gradient_root(site) if not wide and whole_gradient else None,
        )

    def metric_root(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return `low_rank.factor` of the site's metric, computed once for all sites that share it."""
        return self._root(self.metrics[site.name], _metric_key(site))

    def gradient_root(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return `low_rank.factor` of the site's gradient metric, computed once."""
        return self._root(self.gradients[site.name], site.name)

    def _root(self, metric: Tensor, key: str) -> tuple[Tensor, Tensor]:
        if key not in self._roots:
            self._roots[key] = factor(metric)
        return self._roots[key]

    def truncate(self, module: nn.Module, prefix: str, ranks: Mapping[str, int]) -> None:
        """Cut projections of the dense block `module` to `ranks` by `Site.name`; a bias absorbs the mean error."""
        for site in self.sites:
            if site.name not in ranks:
                continue
            linear = module.get_submodule(site.name.removeprefix(f"{prefix}."))
            weight, kernel = self.weights[site.name], linear.get_parameter("weight")
            cut = self.target(site, None).truncated("pilon", ranks[site.name])
            if site.bias:
                linear.get_parameter("bias").add_((self.means[site.name] @ (weight - cut)).to(kernel.dtype))
            kernel.copy_((cut if type(linear).__name__ == "Conv1D" else cut.T).to(kernel.dtype))

    def prune(self, module: nn.Module, prefix: str, neurons: int) -> None:
        """Let `down` of the dense block `module` read `neurons` of its neurons only; a bias absorbs the mean error."""
        assert self.down is not None and self.elimination is not None
        name, left = self.down.name, self.elimination.left(neurons)
        linear = module.get_submodule(name.removeprefix(f"{prefix}."))
        kernel = linear.get_parameter("weight")
        turned = type(linear).__name__ == "Conv1D"
        dense = (kernel if turned else kernel.T).double()
        full = torch.zeros_like(dense).index_copy(0, left, refit(self.weights[name], self.metrics[name], left))
        if self.down.bias:
            linear.get_parameter("bias").add_((self.means[name] @ (dense - full)).to(kernel.dtype))
        kernel.copy_((full if turned else full.T).to(kernel.dtype))


@dataclass(frozen=True)
class Dense:
    """A dense model: the projections that are replaced, as `sites`, and what calibration measured of them."""

    source: Source
    sites: Sequence[Site]
    moments: Moments

    def layers(self) -> dict[int, list[Site]]:
        """Return the sites by layer."""
        found: dict[int, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.layer, []).append(site)
        return found

    def blocks(self, layer: int) -> dict[Kind, list[Site]]:
        """Return the sites of a layer by kind of block, in the order in which it computes them."""
        return blocks_of(self.layers().get(layer, []))

    def read(self, layer: int, kind: Kind | None = None) -> FeedForward:
        """Read one block of a layer, and its moments: the feed-forward one, or else the last that is replaced."""
        blocks = self.blocks(layer)
        with self.source.block(layer) as module:
            sites = blocks[kind or list(blocks)[-1]]
            return FeedForward.of(module, self.source.names[layer], layer, sites, self.moments)

    def targets(self, bank: BankPlan, left: Mapping[int, Tensor | None]) -> list[Target]:
        """Return least-squares targets of the layers that share `bank`, with the neurons that are `left`."""
        found = []
        for site in bank.sites:
            ff = self.read(site.layer, site.target)
            dense = next(one for one in ff.sites if one.name == site.name)
            found.append(ff.target(dense, None if ff.down is None else left.get(site.layer)))
        return found


def _metric_key(site: Site) -> str:
    return f"{site.input} {site.bias}"


def dense_weight(linear: nn.Module) -> Tensor:
    """Return the weight (d_in, d_out), float64, whichever way round the dense model stores it."""
    weight = linear.get_parameter("weight").detach().double()
    return weight if type(linear).__name__ == "Conv1D" else weight.T
