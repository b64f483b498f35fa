"""One layer after another: each is fitted to what the dense model does, given what the converted layers before it did.

    x, t    the dense stream: a projection's input, and what it should put out
    x̂       the same input in the converted stream, which carries the errors of all layers before

    minimise  E ‖t - x̂ Ŵ‖²_G    hence  W̃ = (Ĉ + εI)⁻¹ (E[x̂ tᵀ] + ε W),  Ĉ = E[x̂ x̂ᵀ],  then  Ŵ from W̃ in the metric Ĉ

For up and gate t = x W (the anchored objective of AA-SVD, 2026). For down, t also makes up for what the residual stream
has lost: it is the dense model's sum after the block less the converted model's sum before it.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.convert.calibrate.damping import damped_cholesky
from pilon_compress.convert.calibrate.second_moments import add_gram
from pilon_compress.convert.solve.low_rank import DAMPING, Target, damped
from pilon_compress.models.hidden_states import Stream

SKIPPED = (nn.Dropout, nn.Identity)


@dataclass
class Cross:
    """Running means and centred cross moments of paired rows x̂ (N, d) and t (N, o), merged batch by batch."""

    count: int
    mean_x: Tensor
    mean_t: Tensor
    xx: Tensor
    xt: Tensor

    @classmethod
    def empty(cls, d: int, o: int, like: Tensor) -> "Cross":
        zeros = like.new_zeros
        return cls(0, zeros(d), zeros(o), zeros(d, d), zeros(d, o))

    def update(self, x: Tensor, t: Tensor) -> None:
        """Pairwise update as in `moments.SecondMoment`."""
        if not len(x):
            return
        mean_x, mean_t = x.mean(0), t.mean(0)
        x, t = x - mean_x, t - mean_t
        shift_x, shift_t = mean_x - self.mean_x, mean_t - self.mean_t
        total = self.count + len(x)
        weight = self.count * len(x) / total
        add_gram(self.xx, x).addr_(shift_x, shift_x, alpha=weight)
        self.xt.addmm_(x.T, t).addr_(shift_x, shift_t, alpha=weight)
        self.mean_x += shift_x * (len(x) / total)
        self.mean_t += shift_t * (len(x) / total)
        self.count = total

    def target(self, start: Target, centred: bool) -> Target:
        """The anchored problem that replaces `start`, whose weight is what no evidence leaves in place."""
        xx, xt = self.xx.double() / self.count, self.xt.double() / self.count
        if not centred:
            mean_x, mean_t = self.mean_x.double(), self.mean_t.double()
            xx, xt = xx + torch.outer(mean_x, mean_x), xt + torch.outer(mean_x, mean_t)
        ridge = float(DAMPING * xx.diagonal().mean())
        if not ridge > 0:  # inputs that never vary, those of dead neurons: no evidence
            return replace(start, metric=damped(xx), metric_root=None)
        xx.diagonal().add_(ridge)
        right = xt.add_(start.weight, alpha=ridge)
        weight = torch.cholesky_solve(right, damped_cholesky(xx, start.name))
        return Target(start.name, start.layer, weight, xx, start.gradient, gradient_root=start.gradient_root)

    def bias(self, weight: Tensor) -> Tensor:
        """The bias that makes the mean output error zero: E t - E x̂ Ŵ."""
        return self.mean_t.double() - self.mean_x.double() @ weight


class Pair:
    """A dense block and the converted one in its place, run side by side on their own streams."""

    def __init__(self, dense: nn.Module, ours: nn.Module, theirs: Stream, stream: Stream) -> None:
        self.dense, self.ours, self.theirs, self.stream = dense, ours, theirs, stream
        self.sums: list[Tensor] = []  # the dense residual sum that `down` adds to

    @torch.no_grad()
    def inputs(self, projections: Sequence[str], down: str | None) -> dict[str, Cross]:
        """Cross moments of the inputs that `projections` (names inside the block) read in both streams.

        Runs the dense block for good: its stream moves on batch by batch, and the sums after `down` are remembered.
        """
        crosses: dict[str, Cross] = {}
        for index, mask in enumerate(self.stream.block_masks):
            with ExitStack() as stack:
                seen = [stack.enter_context(_Notes(self.dense, projections, down))]
                output = self.theirs.call(self.dense, index, self.theirs.hidden[index])
                if projections:
                    seen.append(stack.enter_context(_Notes(self.ours, projections, None, stop=True)))
                    with suppress(_Enough):
                        self.stream.call(self.ours, index, self.stream.hidden[index])
            for name in projections:
                x, t = (_rows(notes.inputs[name], mask) for notes in reversed(seen))
                if name not in crosses:
                    crosses[name] = Cross.empty(x.shape[1], t.shape[1], x)
                crosses[name].update(x, t)
            self.theirs.hidden[index] = output
            if down is not None:
                self.sums.append(seen[0].sum(self.stream.turned(output)))
        return crosses

    @torch.no_grad()
    def output(self, down: str) -> Cross:
        """Cross moments of what `down` reads in the converted block and what it should put out."""
        cross: Cross | None = None
        for index, mask in enumerate(self.stream.block_masks):
            with _Notes(self.ours, [down], down) as notes:
                output = self.stream.call(self.ours, index, self.stream.hidden[index])
            residual = notes.sum(self.stream.turned(output)) - notes.output
            x, t = _rows(notes.inputs[down], mask), _rows(self.sums[index] - residual, mask)
            cross = cross or Cross.empty(x.shape[1], t.shape[1], x)
            cross.update(x, t)
        assert cross is not None
        return cross

    def finish(self) -> None:
        """Move both streams behind the block."""
        self.theirs.position += 1
        self.stream.advance(self.ours)


class _Enough(Exception):
    """All inputs that were asked for have been seen: the rest of the block need not run."""


class _Notes:
    """Inputs of some projections of a block while it runs; of `down` also the output, and the sum that it goes into.

    With `stop` the block is left, by `_Enough`, as soon as the inputs are known.
    """

    def __init__(self, block: nn.Module, projections: Sequence[str], down: str | None, stop: bool = False) -> None:
        self.block, self.projections, self.down, self.stop = block, projections, down, stop
        self.inputs: dict[str, Tensor] = {}
        self.output: Tensor = torch.empty(0)
        self.after: Tensor | None = None  # the input of the first module that runs on what came of `down`

    def __enter__(self) -> "_Notes":
        self.handles = []
        for name in self.projections:
            module = self.block.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(lambda _m, args, n=name: self._see(n, args[0])))
        if self.down is not None:
            down = self.block.get_submodule(self.down)
            self.handles.append(down.register_forward_hook(self._put_out))
            for module in self.block.modules():
                if module is not self.block and not any(True for _ in module.children()):
                    self.handles.append(module.register_forward_pre_hook(self._next))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, name: str, x: Tensor) -> None:
        self.inputs[name] = x
        if self.stop and len(self.inputs) == len(self.projections):
            raise _Enough

    def _put_out(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.output, self.after = output, None

    def _next(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        ran = self.output.numel() > 0
        if ran and self.after is None and not isinstance(module, SKIPPED) and args and torch.is_tensor(args[0]):
            self.after = args[0]

    def sum(self, output: Tensor) -> Tensor:
        """What `down`'s output becomes part of: the input of the norm behind it, or else the block's output."""
        return (output if self.after is None else self.after).reshape(self.output.shape)


def _rows(x: Tensor, mask: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])[mask.reshape(-1)].float()
