"""Cut a model, in place, to a share of its feed-forward numbers: fewer neurons, and fewer components of its factors.

What each block loses is decided by the multiple-choice knapsack that conversions use, over the losses in the file.
`down` is refitted for the neurons that go (`factors.compensated`), and biases absorb the mean error. No text is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.elastic.factors import compensated
from pilon_compress.elastic.knapsack import Option, choose, pareto
from pilon_compress.elastic.worth import BlockWorth, check_keep
from pilon_compress.errors import BadInput
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.layout import Host, Layout
from pilon_compress.nn.size import replaced_size

STEP, LARGE = 8, 256  # neurons go by so many at a time in blocks of at least so many
COUNTS, RANKS, PRICES = 32, 24, 40  # tried in blocks that have factors: neurons, ranks of each, weights of size to loss


@dataclass(frozen=True)
class Form:
    """The size of a block: remaining neurons, and ranks of its composed projections by name."""

    neurons: int
    ranks: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def cut(model: Host, blocks: Sequence[BlockWorth], keep: float) -> None:
    """Cut `model`, in place, to at most `keep` of the feed-forward numbers that it stores. Deterministic.

    Raises BadInput for a `keep` that is out of range or too small, and for `blocks` of another model.
    """
    keep, layout = check_keep(keep), layout_of(model)
    _check(layout, blocks)
    for block, form in zip(blocks, choose_forms(layout, blocks, keep), strict=True):
        for name, rank in form.ranks.items():
            _cut_rank(model.base_model.get_submodule(name), rank, block.means[name])
        if form.neurons < len(block.mean):
            _cut_neurons(model, block, form.neurons)


def choose_forms(layout: Layout, blocks: Sequence[BlockWorth], keep: float) -> list[Form]:
    """Choose every block's form: the least loss within `keep` of the numbers. Raises BadInput if none fits."""
    menus = [_menu(layout, block) for block in blocks]
    total = replaced_size(layout).stored
    chosen = choose(menus, keep * total)
    if chosen is None:
        least = sum(menu[0].stored for menu in menus) / total
        raise BadInput(f"keep {keep:g} is too small: the smallest cut keeps {least:.3g} of the feed-forward numbers")
    return [option.what for option in chosen]  # type: ignore[misc]


def _menu(layout: Layout, block: BlockWorth) -> list[Option]:
    """The forms that a block may take with loss and numbers, smallest first."""
    width = len(block.mean)
    step = STEP if width >= LARGE else 1
    counts = [*range(step, width, step), width]
    if not block.savings:
        return pareto([_option(layout, block, Form(count)) for count in counts])
    counts = [*counts[:: -(-len(counts) // COUNTS)], width]
    tails = {name: torch.cat([s.flip(0).cumsum(0).flip(0), s.new_zeros(1)]) for name, s in block.savings.items()}
    highest = max(float(tail[1]) for tail in tails.values()) or 1.0
    found = []
    for count in dict.fromkeys(counts):
        for price in torch.logspace(-14, 1, PRICES, base=10).tolist():
            ranks = {name: _rank(layout, block, name, count, tail, price * highest) for name, tail in tails.items()}
            found.append(_option(layout, block, Form(count, ranks)))
    return pareto(found)


def _rank(layout: Layout, block: BlockWorth, name: str, count: int, tail: Tensor, price: float) -> int:
    """The rank of least loss plus `price` times numbers."""
    full = len(tail) - 1
    ranks = torch.tensor(sorted({*range(max(1, full // RANKS), full, max(1, full // RANKS)), full}))
    cost = tail[ranks].double() + price * ranks * sum(_shape(layout, block, name, count))
    return int(ranks[int(cost.argmin())])


def _option(layout: Layout, block: BlockWorth, form: Form) -> Option:
    loss = float(block.loss[form.neurons]) + sum(float(block.savings[n][r:].sum()) for n, r in form.ranks.items())
    stored = macs = 0
    for name in block.names:
        d_in, d_out = _shape(layout, block, name, form.neurons)
        rank = form.ranks.get(name)
        macs += d_in * d_out if rank is None else rank * (d_in + d_out)
        stored += d_in * d_out if rank is None else rank * (d_in + d_out + 1) + 1
        stored += d_out * (layout.matrices[name] if rank is None else layout.projections[name]).bias
    return Option(loss, stored, macs, form)


def _shape(layout: Layout, block: BlockWorth, name: str, neurons: int) -> tuple[int, int]:
    """(d_in, d_out) of a projection with so many neurons in its block."""
    d_in, d_out = layout.shape(name)
    return (neurons, d_out) if name == block.down else (d_in, block.halves * neurons)


def _check(layout: Layout, blocks: Sequence[BlockWorth]) -> None:
    """Raise BadInput unless `blocks` are those of the layout, in plain numbers, each factor of its own."""
    names = [name for block in blocks for name in block.names]
    same = sorted(names) == sorted([*layout.projections, *layout.matrices]) and all(
        layout.shape(block.down)[0] == len(block.mean)
        and all(layout.shape(up)[1] == block.halves * len(block.mean) for up in block.ups)
        and {*block.savings} == {*block.names} & layout.projections.keys() == {*block.means}
        and all(len(s) == layout.banks[layout.projections[n].bank].rank for n, s in block.savings.items())
        for block in blocks
    )
    private = all(spec.n_primitives == 1 and len(layout.users(name)) == 1 for name, spec in layout.banks.items())
    if not same or not private or layout.kinds - {"none"}:
        raise BadInput("elastic.safetensors belongs to another model than the weights beside it: convert again")


def _cut_rank(module: ComposedLinear, rank: int, mean: Tensor) -> None:
    """Drop the last components of a projection; its bias, if there is one, absorbs the mean error."""
    bank = module.bank
    if rank == bank.rank:
        return
    if module.bias is not None:
        latent = (mean.to(bank.A).double() @ bank.A[0, :, rank:].double()) * module.weight[0, rank:].double()
        module.bias.add_((latent @ bank.B[0, rank:].double()).to(module.bias))
    bank.A, bank.B = _parameter(bank.A[:, :, :rank]), _parameter(bank.B[:, :rank])
    module.weight = _parameter(module.weight[:, :rank])


def _cut_neurons(model: Host, block: BlockWorth, count: int) -> None:
    """Drop the last neurons of a block, with `down` refitted in float64."""
    base = model.base_model
    down = base.get_submodule(block.down)
    rows = (down.bank.A[0] if isinstance(down, ComposedLinear) else down.weight.T).double()
    mean, variance, factors = (one.to(rows) for one in (block.mean, block.variance, block.factors))
    fitted = compensated(rows, count, variance, factors)
    if down.bias is not None:
        lost = mean @ rows - mean[:count] @ fitted
        if isinstance(down, ComposedLinear):
            lost = (lost * down.weight[0].double()) @ down.bank.B[0].double()
        down.bias.add_(lost.to(down.bias))
    if isinstance(down, ComposedLinear):
        down.bank.A = _parameter(fitted[None].to(down.bank.A))
    else:
        down.weight = _parameter(fitted.T.to(down.weight))
    down.in_features = count
    for name in block.ups:
        _cut_outputs(base.get_submodule(name), count, block.halves)


def _cut_outputs(up: Any, count: int, halves: int) -> None:
    """Leave the first `count` outputs of each half of an up-like projection."""

    def first(tensor: Tensor, dim: int) -> nn.Parameter:
        parts = tensor.chunk(halves, dim)
        return _parameter(torch.cat([part.narrow(dim, 0, count) for part in parts], dim))

    if isinstance(up, ComposedLinear):
        up.bank.B = first(up.bank.B, 2)
    else:
        up.weight = first(up.weight, 0)
    if up.bias is not None:
        up.bias = first(up.bias, 0)
    up.out_features = halves * count


def _parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter of its own memory, so that what is cut away is freed."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format))
