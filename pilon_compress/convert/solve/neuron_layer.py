"""Solve a layer whose neurons come from a bank, behind the converted layers before it.

The bank's shared neurons stand: for them the layer fits scale and bias before the activation, and the scale behind it.
Neurons that it alone uses are fitted whole, as plain matrices are (`solve.sequential_targets`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pilon_compress.convert.calibrate.damping import damped_cholesky
from pilon_compress.convert.solve.feed_forward import FeedForward
from pilon_compress.convert.solve.layer import LayerShape, Method, judge
from pilon_compress.convert.solve.low_rank import METRIC_DAMPING
from pilon_compress.convert.solve.neuron_fit import LayerStart, NeuronFit, NeuronPart, sources
from pilon_compress.convert.solve.sequential_targets import BlockPair, CrossMoments
from pilon_compress.convert.solve.solved import SolvedLayer, SolvedProjection, Weights
from pilon_compress.models.families import Site
from pilon_compress.nn.neuron_linear import has_scale


class Seen(NamedTuple):
    """Moments of what an up-like matrix reads, x (d,), and of what its outputs are to be, t (k,), without its bias.

    mean (d,)   moment (d, d): centred   target (k,): mean of t   cross (d, k): centred
    """

    mean: Tensor
    moment: Tensor
    target: Tensor
    cross: Tensor

    @classmethod
    def dense(cls, ff: FeedForward, site: Site, columns: Tensor) -> "Seen":
        """Return those of the dense stream, where t = x W for the dense `columns` W (d, k)."""
        mean, moment = ff.means[site.name], ff.metrics[site.name]
        if not site.bias:
            moment = moment - torch.outer(mean, mean)
        return cls(mean, moment, mean @ columns, moment @ columns)

    @classmethod
    def of(cls, cross: CrossMoments) -> "Seen":
        """Return those of the converted stream."""
        scatter = cross.scatter.double() / cross.inputs.count
        return cls(cross.inputs.mean.double(), cross.inputs.covariance(), cross.mean.double(), scatter)

    def outputs(self, places: Tensor) -> "Seen":
        """Return the moments with the outputs at `places` alone."""
        return self._replace(target=self.target[places], cross=self.cross[:, places])

    def affine(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and bias (k,) with which `columns` (d, k) come nearest to the outputs."""
        power = ((self.moment @ columns) * columns).sum(0)
        scale = (columns * self.cross).sum(0) / power.clamp_min(1e-30)
        scale = torch.where(power > 0, scale, torch.ones_like(scale))
        return scale, self.constant(columns * scale)

    def constant(self, columns: Tensor) -> Tensor:
        """Return the bias (k,) that makes the mean error of `columns` zero."""
        return self.target - self.mean @ columns

    def fitted(self, prior: Tensor, centred: bool) -> Tensor:
        """Return columns (d, k) for the outputs by least squares; directions that are not seen keep `prior`'s."""
        moment, cross = self.moment.clone(), self.cross
        ridge = METRIC_DAMPING * moment.diagonal().mean()
        if not ridge > 0:
            return prior
        if not centred:
            moment.addr_(self.mean, self.mean)
            cross = cross + torch.outer(self.mean, self.target)
        moment.diagonal().add_(ridge)
        return torch.cholesky_solve(cross + ridge * prior, damped_cholesky(moment))


def dense_columns(ff: FeedForward, left: Tensor) -> dict[str, Tensor]:
    """Return the dense columns (d_in, k) of the neurons `left` by source: of gated blocks `gate`, then `up`."""
    found = dict[str, Tensor]()
    for site in ff.sites:
        if site != ff.down:
            whole, names = ff.weights[site.name][:, ff.columns(site, left)], sources(site)
            found.update(zip(names, whole.tensor_split(len(names), 1), strict=True))
    return {source: found[source] for source in ("gate", "up") if source in found}


def behind_gate(ff: FeedForward, left: Tensor, fit: NeuronFit) -> Tensor:
    """Return the scales (k,) of the bank's `up` beside a gate, which has none: that of `down` takes them up."""
    start = fit.starts[ff.layer]
    factor, site = torch.ones(len(left), dtype=torch.float64), next(s for s in ff.sites if "up" in sources(s))
    if len(fit.columns) > 1:
        shared = (~start.own).nonzero()[:, 0]
        dense = dense_columns(ff, left)["up"][:, shared]
        factor[shared] = Seen.dense(ff, site, dense).affine(fit.columns["up"][:, start.slots[shared]])[0]
    return factor


def solve_input(
    ff: FeedForward, site: Site, left: Tensor, fit: NeuronFit, cross: CrossMoments | None
) -> tuple[NeuronPart, Tensor | None]:
    """Solve an up-like site: its own part of the bank and its bias (d_out,); without `cross` in the dense stream."""
    start, dense, gated = fit.starts[site.layer], dense_columns(ff, left), len(fit.columns) > 1
    names, own, shared = sources(site), start.own.nonzero()[:, 0], (~start.own).nonzero()[:, 0]
    columns = torch.cat([dense[name] for name in names], 1)
    every = Seen.dense(ff, site, columns) if cross is None else Seen.of(cross.through(columns.float()))
    first = names[0] if has_scale(site.role, gated) else None
    parts, biases, scale = list[Tensor](), list[Tensor](), columns.new_empty(0)
    for place, name in enumerate(names):
        offset, width = place * len(left), columns.new_zeros(len(left))
        known, bank = fit.columns[name][:, start.slots[shared]], every.outputs(offset + shared)
        alone, centred = every.outputs(offset + own), site.bias or name == first
        mine = dense[name][:, own]
        mine = mine if cross is None else alone.fitted(mine, centred)
        parts.append(mine)
        if name == first:
            scale = torch.ones_like(width)
            scale[shared], width[shared] = bank.affine(known)
        elif site.bias:
            width[shared] = bank.constant(known)
        if centred:
            width[own] = alone.constant(mine)
        biases.append(width)
    bias = torch.cat(biases)
    if site.bias:
        bias = bias + ff.biases[site.name][ff.columns(site, left)]
    return NeuronPart(torch.stack(parts), scale), bias if site.bias or first is not None else None


def output_moments(cross: CrossMoments, centred: bool) -> tuple[Tensor, Tensor]:
    """Return E[ĥ ĥᵀ] (k, k) and E[ĥ tᵀ] (k, d_out) of what `down` reads and should put out; `centred`: with a bias."""
    scatter = cross.scatter.double() / cross.inputs.count
    if centred:
        return cross.inputs.covariance(), scatter
    return cross.inputs.second_moment(), scatter.addr_(cross.inputs.mean.double(), cross.mean.double())


def solve_output(moment: Tensor, cross: Tensor, rows: Tensor, start: LayerStart, gradient: Tensor) -> NeuronPart:
    """Solve `down`: the scales of shared rows, and the rows (p, d_out) of neurons that the layer uses alone.

    rows (k, d_out): the bank's, which are the prior of the layer's own
    """
    own = start.own
    scale = fit_scales(moment, cross, rows, start, gradient)
    known = scale[~own, None] * rows[~own]
    inside = _ridged(moment, own)
    right = cross[own] - moment[own][:, ~own] @ known + _ridge(moment) * rows[own]
    return NeuronPart(torch.cholesky_solve(right, damped_cholesky(inside))[None], scale)


def fit_scales(moment: Tensor, cross: Tensor, rows: Tensor, start: LayerStart, gradient: Tensor) -> Tensor:
    """Return the scales (k,) of `rows`, 1 for a layer's own, which answer every change of the shared ones' at once."""
    own, scale = start.own, torch.ones(len(rows), dtype=rows.dtype, device=rows.device)
    if bool(own.all()):
        return scale
    inner, right = moment[~own][:, ~own], cross[~own]
    if bool(own.any()):
        side = moment[~own][:, own]
        alone = cross[own] + _ridge(moment) * rows[own]  # which the prior keeps where nothing is seen
        answer = torch.cholesky_solve(torch.cat([side.T, alone], 1), damped_cholesky(_ridged(moment, own)))
        inner, right = inner - side @ answer[:, : len(inner)], right - side @ answer[:, len(inner) :]
    weighed = rows[~own] @ gradient
    normal = inner * (weighed @ rows[~own].T)
    ridge = METRIC_DAMPING * normal.diagonal().mean()
    normal.diagonal().add_(ridge)
    found = (right * weighed).sum(1) + ridge * start.scale[~own]
    scale[~own] = torch.cholesky_solve(found[:, None], damped_cholesky(normal))[:, 0]
    return scale


def least_squares(moment: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
    """Return the rows (k, d_out) of least error; directions that are not seen keep `prior`'s."""
    ridge = _ridge(moment)
    inside = moment.clone()
    inside.diagonal().add_(ridge)
    return torch.cholesky_solve(cross + ridge * prior, damped_cholesky(inside))


def _ridge(moment: Tensor) -> Tensor:
    return METRIC_DAMPING * moment.diagonal().mean()


def _ridged(moment: Tensor, own: Tensor) -> Tensor:
    found = moment[own][:, own]
    found.diagonal().add_(_ridge(moment))
    return found


def solve_neurons(
    ff: FeedForward, shape: LayerShape, method: Method, pair: BlockPair | None, prefix: str
) -> SolvedLayer:
    """Solve the projections of a layer that uses a bank of neurons: see `solve.layer.solve_layer`."""
    return dict(_NeuronSolver(ff, shape, method, pair, f"{prefix}.").solved())


@dataclass(frozen=True)
class _NeuronSolver:
    ff: FeedForward
    shape: LayerShape
    method: Method
    pair: BlockPair | None
    prefix: str

    def solved(self) -> Iterator[tuple[str, SolvedProjection]]:
        ff, fit, left = self.ff, self.shape.neurons, self.shape.left
        assert fit is not None and left is not None and ff.down is not None
        ups, crosses = [site for site in ff.sites if site != ff.down], dict[str, CrossMoments]()
        if self.pair is not None:
            read = list(dict.fromkeys(self._local(site.input) for site in ups))
            crosses = self.pair.inputs(read, self._local(ff.down.name))
        for site in ups:
            part, bias = solve_input(ff, site, left, fit, crosses.get(self._local(site.input)))
            yield site.name, self._projection(site, part, bias)
        yield ff.down.name, self._projection(ff.down, *self._output(ff.down, fit))

    def _local(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def _output(self, down: Site, fit: NeuronFit) -> tuple[NeuronPart, Tensor | None]:
        start = fit.starts[down.layer]
        rows = fit.rows[start.slots]
        if self.pair is None:
            part = NeuronPart(rows[start.own][None], start.scale)
            return part, start.target - start.mean @ (start.scale[:, None] * rows) if down.bias else None
        zero = torch.zeros(down.d_out, dtype=rows.dtype, device=rows.device) if down.bias else None
        self.pair.replace(self._local(down.name), start.scale[:, None] * rows, zero)
        cross = self.pair.output(self._local(down.name))
        part = solve_output(*output_moments(cross, down.bias), rows, start, self.ff.gradients[down.name])
        return part, cross.bias(fit.approximation(down, part)) if down.bias else None

    def _projection(self, site: Site, part: NeuronPart, bias: Tensor | None) -> SolvedProjection:
        """Let the converted block compute with a part, and judge it."""
        weights = Weights(neurons=part)
        approximation = self.shape.approximation(site, weights)
        if self.pair is not None:
            self.pair.replace(self._local(site.name), approximation, bias)
        return SolvedProjection(weights, bias, *judge(self.ff, self.shape.left, self.method, site, approximation))
