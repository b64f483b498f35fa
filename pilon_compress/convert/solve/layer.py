"""Solve a layer's projections in the shapes of its plan, those first whose outputs the others read.

Attention comes before the feed-forward block: q, k and v, then o behind them. Then up and gate, and down behind them.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.solve.bank_fit import fit_private, recompose, refit
from pilon_compress.convert.solve.feed_forward import FeedForward
from pilon_compress.convert.solve.gptq import round_bank, round_matrix
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.convert.solve.neuron_fit import NeuronFit
from pilon_compress.convert.solve.sequential_targets import BlockPair, CrossMoments, Sum, put_linear
from pilon_compress.convert.solve.solved import SolvedBank, SolvedLayer, SolvedProjection, Weights
from pilon_compress.models.families import Site
from pilon_compress.nn.sizing import affordable


@dataclass(frozen=True)
class Method:
    """The methods by which projections are solved and compared.

    name: pilon, whitened-svd or svd
    baselines: methods whose error is reported beside, at the stored `ratio` of each projection
    quantization: the number format that banks and matrices are rounded to; None if they are not
    """

    name: str
    baselines: Sequence[str]
    ratio: float
    quantization: str | None = None


@dataclass(frozen=True)
class LayerShape:
    """The form of a converted layer: `banks` of its projections by site name, remaining neurons (None: all).

    `shared`: fitted banks of several layers, by bank name. `neurons`: the bank that the layer's neurons come from.
    """

    banks: Mapping[str, BankPlan]
    left: Tensor | None
    shared: Mapping[str, SolvedBank]
    neurons: NeuronFit | None = None

    def approximation(self, site: Site, weights: Weights) -> Tensor:
        """Return the matrix (d_in, d_out), float64, that the weights of a site stand for."""
        if weights.matrix is not None:
            return weights.matrix
        if weights.neurons is not None and self.neurons is not None:
            return self.neurons.approximation(site, weights.neurons)
        if weights.bank is not None:
            return weights.bank.fit.approximation(0)
        assert weights.composition is not None
        bank, place = self.shared_bank(site)
        return bank.fit.recomposed(place, weights.composition, weights.own).approximation(place)

    def shared_bank(self, site: Site) -> tuple[SolvedBank, int]:
        """Return the bank that the site shares, and the site's place among its layers."""
        plan = self.banks[site.name]
        return self.shared[plan.name], [one.name for one in plan.sites].index(site.name)


def solve_layer(
    blocks: Sequence[FeedForward], shape: LayerShape, method: Method, pair: BlockPair | None, prefix: str
) -> SolvedLayer:
    """Solve the projections of a layer; with `pair`, behind the converted layers before it.

    blocks: in the order in which the layer computes them   prefix: name of the layer's transformer block
    The converted block of `pair` computes with what was solved; its dense stream has moved on.
    """
    found: SolvedLayer = {}
    for block in blocks:
        own = shape if block.down is not None else replace(shape, left=None)
        found |= _Solver(block, own, method, pair, f"{prefix}.", moves=block is blocks[-1]).solved()
    return found


def resume_layer(sites: Sequence[Site], solved: SolvedLayer, shape: LayerShape, pair: BlockPair, prefix: str) -> None:
    """Leave `pair` as `solve_layer` would have: its converted block computes with what was solved before."""
    pair.inputs()
    for site in sites:
        one = solved[site.name]
        pair.replace(site.name.removeprefix(f"{prefix}."), shape.approximation(site, one.weights), one.bias)


def converted_block(
    module: nn.Module, prefix: str, sites: Sequence[Site], solved: SolvedLayer, shape: LayerShape
) -> nn.Module:
    """Return a copy of the dense block `module`, whose name is `prefix`, that computes with what was solved."""
    block = copy.deepcopy(module)
    for site in sites:
        one, name = solved[site.name], site.name.removeprefix(f"{prefix}.")
        like = module.get_submodule(name).get_parameter("weight")
        put_linear(block, name, shape.approximation(site, one.weights), one.bias, like)
    return block


@dataclass(frozen=True)
class _Solver:
    ff: FeedForward
    shape: LayerShape
    method: Method
    pair: BlockPair | None
    prefix: str
    moves: bool
    """True for the last block of a layer, behind which the dense stream moves on."""

    def solved(self) -> SolvedLayer:
        ff = self.ff
        ends = [site for site in ff.sites if site.role in ("down", "o")]
        end = ends[0] if len(ends) == 1 and len(ff.sites) > 1 else None
        firsts, found = [site for site in ff.sites if site != end], SolvedLayer()
        sums: Sum | None = None
        if self.pair is not None and end is not None:
            sums = "next" if end.role == "down" else self.pair.sum_of(self.local(end.name))
        crosses = self._crosses(firsts, None if sums is None else end, sums, self.moves and (end is None or bool(sums)))
        for site in firsts:
            found[site.name] = self._projection(site, ff.target(site, self.shape.left), crosses.get(site.name))
        if end is not None:
            found[end.name] = self._end(end, sums)
        return found

    def _end(self, end: Site, sums: Sum | None) -> SolvedProjection:
        """Solve the projection that reads what the others make: with `sums` for the residual sum, else for itself."""
        start = self.ff.target(end, self.shape.left)
        if self.pair is None:
            return self._projection(end, start, None)
        if sums is None:  # of a block whose sum cannot be told
            return self._projection(end, start, self._crosses([end], None, None, self.moves)[end.name])
        self.pair.replace(self.local(end.name), start.weight, self._absorbed(end, start.weight))
        return self._projection(end, start, self.pair.output(self.local(end.name), sums), summed=True)

    def _crosses(
        self, sites: Sequence[Site], end: Site | None, sums: Sum | None, moves: bool
    ) -> dict[str, CrossMoments]:
        """Cross moments of what these sites read in the converted block and what they should put out, by name.

        Without a pair none.
        """
        if self.pair is None:
            return {}
        read = list(dict.fromkeys(self.local(site.input) for site in sites))
        crosses = self.pair.inputs(read, None if end is None else self.local(end.name), sums or "next", moves)
        return {site.name: crosses[self.local(site.input)].through(self._dense(site).float()) for site in sites}

    def local(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def _dense(self, site: Site) -> Tensor:
        """The dense weight of an up-like site, with the neurons that are left."""
        weight = self.ff.weights[site.name]
        if self.shape.left is None or self.ff.down is None:
            return weight
        return weight[:, self.ff.columns(site, self.shape.left)]

    def _projection(
        self, site: Site, start: Target, cross: CrossMoments | None, summed: bool = False
    ) -> SolvedProjection:
        """Solve one projection, and let the converted block compute with it.

        summed: the target is what the residual sum misses, else the weight's product alone
        """
        target = start if cross is None else cross.target(start, site.bias)
        weights = self._weights(site, target, sequential=cross is not None)
        approximation, bias = self.shape.approximation(site, weights), None
        if site.bias and cross is None:
            bias = self._absorbed(site, approximation)
        elif site.bias and cross is not None:
            bias = cross.bias(approximation) + (0 if summed else self._constant(site))
        if self.pair is not None:
            self.pair.replace(self.local(site.name), approximation, bias)
        return SolvedProjection(weights, bias, *judge(self.ff, self.shape.left, self.method, site, approximation))

    def _weights(self, site: Site, target: Target, sequential: bool) -> Weights:
        """The weights in the plan's form; `sequential`: a layer's own part of a shared bank is fitted to the target."""
        plan, quantization = self.shape.banks.get(site.name), self.method.quantization
        if plan is None:
            rounded = None if quantization is None else round_matrix(target, quantization)
            return Weights(target.weight if rounded is None else rounded.values[0], rounded)
        if len(plan.sites) == 1:
            fit = fit_private([target], plan, self.method.name)
            if quantization is None:
                return Weights(bank=SolvedBank(fit))
            return Weights(bank=SolvedBank(*round_bank(fit, [target], plan, quantization)))
        shared, place = self.shape.shared_bank(site)
        if not sequential:
            return Weights(composition=shared.fit.weight[place])
        if shared.A is not None:  # the integers of the bank stand
            return Weights(composition=recompose(shared.fit, place, target, plan))
        composition, own = refit(shared.fit, place, target, plan)
        return Weights(composition=composition, own=own)

    def _constant(self, site: Site) -> Tensor:
        """The dense bias, where the target is a weight's product alone; the residual sums contain it already."""
        bias = self.ff.biases[site.name]
        return bias if self.shape.left is None else bias[self.ff.columns(site, self.shape.left)]

    def _absorbed(self, site: Site, approximation: Tensor) -> Tensor | None:
        """b' = b + μ W - μ̂ Ŵ on the dense model's own inputs: the mean error of the output becomes zero."""
        if not site.bias:
            return None
        ff, left = self.ff, self.shape.left
        weight, mean, bias = ff.weights[site.name], ff.means[site.name], ff.biases[site.name]
        output = bias + mean @ weight
        if left is None:
            return output - mean @ approximation
        if site == ff.down:
            return output - mean[left] @ approximation
        return output[ff.columns(site, left)] - mean @ approximation


def judge(
    ff: FeedForward, left: Tensor | None, method: Method, site: Site, approximation: Tensor
) -> tuple[dict[str, float], Tensor]:
    """Return errors by method, and the spectrum, on the dense model's own inputs; `left`: neurons that stay."""
    whole = ff.target(site, None)
    if left is not None and site == ff.down:
        approximation = torch.zeros_like(whole.weight).index_copy(0, left, approximation)
    elif left is not None:  # outputs of dropped neurons are not counted as error
        approximation = whole.weight.index_copy(1, ff.columns(site, left), approximation)
    errors = {method.name: whole.output_loss(approximation)}
    rank = uniform_rank(site, method.ratio)
    for name in method.baselines:
        if name not in errors:
            errors[name] = whole.truncation_loss(name, rank)
    return {name: max(0.0, value) for name, value in errors.items()}, whole.spectrum


def uniform_rank(site: Site, ratio: float) -> int:
    """Return the rank of two factors that store `ratio` of the site's numbers: what the baselines get."""
    most = min(site.d_in, site.d_out)
    return max(1, affordable(ratio * site.parameters, site.d_out * site.bias, site.d_in + site.d_out, most))
