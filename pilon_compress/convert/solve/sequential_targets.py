"""Compute sequential targets: each layer fits the dense outputs, given the errors of the converted layers before.

    x, t    the dense stream: a projection's input, and what it should put out
    x̂       the same input in the converted stream, which carries the errors of all layers before

    minimise  E ‖t - x̂ Ŵ‖²_G    hence  W̃ = (Ĉ + εI)⁻¹ (E[x̂ tᵀ] + ε W),  Ĉ = E[x̂ x̂ᵀ],  then  Ŵ from W̃ in the metric Ĉ

For up and gate, q, k and v t = x W (the anchored objective of AA-SVD, 2026). For down and o, t also makes up for what
the residual stream has lost: it is the dense model's sum after the block less the converted model's sum before it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pilon_compress.convert.calibrate.damping import damped_cholesky
from pilon_compress.convert.calibrate.second_moments import SecondMoment, merge
from pilon_compress.convert.solve.low_rank import METRIC_DAMPING, Target, damped
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.hooks import Before, hooked

SKIPPED = (nn.Dropout, nn.Identity)
SUMMED = 0.05  # relative error at which a sum still counts as one: half precision

Sum = Literal["next", "output"]
"""The residual sum that a projection adds to: the input of the next module (the norm behind it), or the output of the
transformer block, where attention and feed-forward part add to it side by side."""
SUMS: tuple[Sum, ...] = get_args(Sum)


@dataclass(frozen=True)
class CrossMoments:
    """Moments of paired rows x̂ (N, d) and t (N, o): those of `inputs`, the mean of t (o,), cross scatter (d, o)."""

    inputs: SecondMoment
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, d: int, o: int, like: Tensor) -> "CrossMoments":
        """Return moments of no rows, for x̂ of width `d` and t of width `o`, with dtype and device of `like`."""
        return cls(SecondMoment(d, like.dtype, like.device), like.new_zeros(o), like.new_zeros(d, o))

    def update(self, x: Tensor, t: Tensor) -> None:
        """Add paired rows."""
        count = self.inputs.count
        batch = self.inputs.update(x)
        if batch is None:
            return
        other = merge(count, self.mean, t)
        self.scatter.addmm_(batch.centred.T, other.centred).addr_(batch.shift, other.shift, alpha=batch.weight)
        self.mean.add_(other.shift * other.share)

    def through(self, weight: Tensor) -> "CrossMoments":
        """Return the moments with t W in the place of t, for a weight (o, d_out)."""
        return CrossMoments(self.inputs, self.mean @ weight, self.scatter @ weight)

    def target(self, start: Target, centred: bool) -> Target:
        """Return the least-squares target given the errors of the layers already converted.

        `start.weight` is the ridge prior: directions without calibration evidence keep it.
        """
        xt = self.scatter.double() / self.inputs.count
        if centred:
            xx = self.inputs.covariance()
        else:
            xx = self.inputs.second_moment()
            xt = xt + torch.outer(self.inputs.mean.double(), self.mean.double())
        ridge = float(METRIC_DAMPING * xx.diagonal().mean())
        if not ridge > 0:  # inputs that never vary, those of dead neurons: no evidence
            return replace(start, metric=damped(xx), metric_root=None)
        xx.diagonal().add_(ridge)
        right = xt.add_(start.weight, alpha=ridge)
        weight = torch.cholesky_solve(right, damped_cholesky(xx, start.name))
        return Target(start.name, start.layer, weight, xx, start.gradient, gradient_root=start.gradient_root)

    def bias(self, weight: Tensor) -> Tensor:
        """The bias that makes the mean output error zero: E t - E x̂ Ŵ."""
        return self.mean.double() - self.inputs.mean.double() @ weight


class BlockPair:
    """A dense block and the converted one in its place, run side by side on their own streams."""

    def __init__(self, dense: nn.Module, converted: nn.Module, theirs: Stream, stream: Stream) -> None:
        self.dense, self.converted, self.theirs, self.stream = dense, converted, theirs, stream
        self.sums: list[Tensor] = []  # the dense residual sum that `down` adds to

    @torch.no_grad()
    def inputs(
        self, projections: Sequence[str] = (), down: str | None = None, at: Sum = "next", moves: bool = True
    ) -> dict[str, CrossMoments]:
        """Cross moments of the inputs that `projections` (names inside the block) read in both streams.

        Runs the dense block: its stream moves on batch by batch where it `moves`, and the sums that `down` adds to are
        remembered.
        """
        crosses: dict[str, CrossMoments] = {}
        self.sums.clear()
        for index, mask in enumerate(self.stream.block_masks):
            with _noting(self.dense, projections, down) as dense:
                output = self.theirs.call(self.dense, index, self.theirs.hidden[index])
            if projections:
                with _noting(self.converted, projections, stop=True) as converted, suppress(_AllRecorded):
                    self.stream.call(self.converted, index, self.stream.hidden[index])
            for name in projections:
                x, t = (_rows(notes.inputs[name], mask) for notes in (converted, dense))
                if name not in crosses:
                    crosses[name] = CrossMoments.empty(x.shape[1], t.shape[1], x)
                crosses[name].update(x, t)
            if moves:
                self.theirs.hidden[index] = output
            if down is not None:
                self.sums.append(dense.sum(self.stream.turned(output), at))
        return crosses

    @torch.no_grad()
    def sum_of(self, name: str) -> Sum | None:
        """Return the residual sum that the projection `name` adds to; None where neither grows by its output.

        Measured: the dense block runs on the first batch again, with twice the projection's output.
        """
        states, found = self.theirs.hidden[0], []
        for factor in (1, 2):
            scaled = partial(_scaled, factor)
            with hooked(self.dense, after=[(name, scaled)]), _noting(self.dense, (), name) as notes:
                output = self.stream.turned(self.theirs.call(self.dense, 0, states))
            found.append((notes, output))
        (once, before), (twice, after) = found
        for at in SUMS:
            grown = twice.sum(after, at) - once.sum(before, at)
            if (grown - once.output.reshape(grown.shape)).norm() <= SUMMED * once.output.norm():
                return at
        return None

    @torch.no_grad()
    def output(self, down: str, at: Sum = "next") -> CrossMoments:
        """Cross moments of what `down` reads in the converted block and what it should put out, for the sum `at`."""
        cross: CrossMoments | None = None
        for index, mask in enumerate(self.stream.block_masks):
            with _noting(self.converted, [down], down) as notes:
                output = self.stream.call(self.converted, index, self.stream.hidden[index])
            residual = notes.sum(self.stream.turned(output), at) - notes.output
            x, t = _rows(notes.inputs[down], mask), _rows(self.sums[index] - residual, mask)
            cross = cross or CrossMoments.empty(x.shape[1], t.shape[1], x)
            cross.update(x, t)
        assert cross is not None
        return cross

    def replace(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Let the converted block compute with this weight (d_in, d_out) and bias from here on."""
        put_linear(self.converted, name, weight, bias, self.dense.get_submodule(name).get_parameter("weight"))

    def finish(self) -> None:
        """Move both streams behind the block."""
        self.theirs.position += 1
        self.stream.advance(self.converted)


def put_linear(block: nn.Module, name: str, weight: Tensor, bias: Tensor | None, like: Tensor) -> None:
    """Let `block` compute its projection `name` with this weight (d_in, d_out) and bias, of the type of `like`."""
    d_in, d_out = weight.shape
    linear = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.T.to(like).contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(like), requires_grad=False)
    block.set_submodule(name, linear)


def _scaled(factor: float, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    return factor * output


class _AllRecorded(Exception):
    """Raised when all requested inputs have been recorded, so that the rest of the block need not run."""


class _Recorder:
    """Inputs of some projections while their block runs; of `down` also the output, and the sum that it goes into."""

    def __init__(self, enough: int | None) -> None:
        self.enough = enough  # inputs after which the block is left
        self.inputs: dict[str, Tensor] = {}
        self.output: Tensor = torch.empty(0)
        self.after: Tensor | None = None  # the input of the first module that runs on what came of `down`

    def see(self, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs[name] = args[0]
        if len(self.inputs) == self.enough:
            raise _AllRecorded

    def put_out(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        self.output, self.after = output, None

    def next(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        ran = self.output.numel() > 0
        if ran and self.after is None and not isinstance(module, SKIPPED) and args and torch.is_tensor(args[0]):
            self.after = args[0]

    def sum(self, output: Tensor, at: Sum = "next") -> Tensor:
        """The residual sum that `down` adds to: the input of the norm behind it, or else the block's `output`."""
        return (output if self.after is None or at == "output" else self.after).reshape(self.output.shape)


@contextmanager
def _noting(
    block: nn.Module, projections: Sequence[str], down: str | None = None, stop: bool = False
) -> Iterator[_Recorder]:
    """Note the inputs of `projections`. With `stop` the block is left, by `_AllRecorded`, once they are known."""
    notes = _Recorder(len(projections) if stop else None)
    before: list[tuple[str, Before]] = [(name, partial(notes.see, name)) for name in projections]
    if down is not None:
        leaves = (name for name, module in block.named_modules() if name and not any(True for _ in module.children()))
        before += [(name, notes.next) for name in leaves]
    with hooked(block, before, [] if down is None else [(down, notes.put_out)]):
        yield notes


def _rows(x: Tensor, mask: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])[mask.reshape(-1)].float()
