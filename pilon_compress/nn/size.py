"""Compute stored parameters, bytes and MACs per token, PILON beside dense."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from pilon_compress.nn.additions import addition
from pilon_compress.nn.formats.registry import FORMATS, grid_of
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.neuron_linear import biased_outputs
from pilon_compress.nn.part import linear_shape
from pilon_compress.nn.router import NARROW
from pilon_compress.nn.specs import RouterSpec
from pilon_compress.nn.targets import Target, target_of
from pilon_compress.results.sizes import Share, Sizes

DENSE_ITEMSIZE = 2  # `dense_bytes` is the dense model in bfloat16, whatever it was stored in
INDEX_ITEMSIZE = 8  # selected primitives are int64
SCALE_ITEMSIZE = 4  # scales of packed projections and of 8-bit rows are float32


@dataclass(frozen=True)
class Size:
    """Numbers stored, bytes on disk, MACs per token; of the PILON form and of the dense one that it replaces.

    MACs are those of matrix products with weights: attention scores, norms and look-ups do not count. A composition
    that would cost more MACs than its dense matrix counts as the dense one, which is how `fold` runs it; not so in a
    format with a kernel, which counts what the kernel computes, with its padding (`Format.multiple`). A block with
    experts stores all of them and its router, and computes a token with the active ones, which do not fold.
    """

    stored: int
    dense_stored: int
    bytes: int
    dense_bytes: int
    macs: int
    dense_macs: int

    def __add__(self, other: "Size") -> "Size":
        return Size(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def over_dense(self, source_itemsize: int = DENSE_ITEMSIZE) -> Sizes:
        """The figures with their ratios, PILON over dense; `source_itemsize`: bytes per number of the dense file.

        Ratios of nothing to nothing are 1.
        """
        source_bytes = self.dense_bytes // DENSE_ITEMSIZE * source_itemsize
        return Sizes(
            stored_ratio=_over(self.stored, self.dense_stored),
            bytes_ratio=_over(self.bytes, self.dense_bytes),
            bytes_ratio_to_source=_over(self.bytes, source_bytes),
            bytes_ratio_to_bf16=_over(self.bytes, self.dense_bytes),
            mac_ratio=_over(self.macs, self.dense_macs),
            **vars(self),
            source_bytes=source_bytes,
        )


def _over(numbers: int, dense: int) -> float:
    return numbers / dense if dense else 1.0


NOTHING = Size(0, 0, 0, 0, 0, 0)


def bank_size(layout: Layout, bank: str, itemsize: int = DENSE_ITEMSIZE) -> Size:
    """Return the size of a bank and its projections; `itemsize` in bytes per float."""
    spec = layout.banks[bank]
    numbers = spec.n_primitives * spec.rank * (spec.d_in + spec.d_out)
    numbers += _added(layout, bank)
    indices = scales = macs = dense = dense_macs = 0
    kind = FORMATS[spec.quantization]
    for name in layout.users(bank):
        user = layout.projections[name]
        width = spec.rank if user.composition == "component" else 1
        weights = (spec.n_primitives if user.composition == "softmax" else user.top_k) * width
        numbers += user.experts * weights + user.bias * spec.d_out
        indices += 0 if user.composition == "softmax" else layout.selections(name) * user.top_k
        scales += user.experts * user.top_k * width + _added(layout, name, exact=True)
        numbers += _added(layout, name)
        d_in, d_out = layout.host_shape(name)
        macs += projection_macs(layout, name)
        dense += d_in * d_out + user.bias * d_out
        dense_macs += d_in * d_out
    size = spec.n_primitives * sum(kind.matrix_bytes(d, spec.rank, itemsize) for d in (spec.d_in, spec.d_out))
    rest = numbers - spec.n_primitives * spec.rank * (spec.d_in + spec.d_out)
    exact = scales if kind.exact_compositions else 0
    size += exact * SCALE_ITEMSIZE + (rest - exact) * itemsize
    return Size(
        stored=numbers + indices,
        dense_stored=dense,
        bytes=size + indices * INDEX_ITEMSIZE,
        dense_bytes=dense * DENSE_ITEMSIZE,
        macs=macs,
        dense_macs=dense_macs,
    )


def _added(layout: Layout, place: str, exact: bool = False) -> int:
    """Numbers that additions of research store at a bank or projection; `exact`: those in float32 whatever the rest."""
    here = [addition(name, kind) for name, kind, where in layout.additions() if where == place]
    return sum(one.numbers(layout, place) for one in here if not exact or one.exact)


def dense_size(layout: Layout, name: str, itemsize: int = DENSE_ITEMSIZE) -> Size:
    """Return the size of a dense projection, beside that of the base architecture."""
    spec, (d_in, d_out) = layout.matrices[name], layout.host_shape(name)
    kind = FORMATS[spec.quantization]
    macs, dense_macs = projection_macs(layout, name), d_in * d_out
    rest = spec.bias * spec.d_out + _added(layout, name)
    scales = kind.matrix_scales(spec.d_out)
    stored, dense = spec.d_in * spec.d_out + rest + scales, dense_macs + spec.bias * d_out
    size = kind.matrix_bytes(spec.d_in, spec.d_out, itemsize) + scales * SCALE_ITEMSIZE + rest * itemsize
    return Size(stored, dense, size, dense * DENSE_ITEMSIZE, macs, dense_macs)


def neuron_size(layout: Layout, bank: str, itemsize: int = DENSE_ITEMSIZE) -> Size:
    """Return the size of a bank of neurons and its projections, as `bank_size`; a block's selection counts once."""
    spec, users = layout.neuron_banks[bank], layout.users(bank)
    kind = FORMATS[spec.quantization]
    shapes = [(spec.d_in, spec.neurons)] * (1 + spec.gated) + [(spec.neurons, spec.d_out)]
    exact = sum(kind.matrix_scales(d_out) for _, d_out in shapes)
    size = sum(kind.matrix_bytes(d_in, d_out, itemsize) for d_in, d_out in shapes) + exact * SCALE_ITEMSIZE
    numbers = sum(d_in * d_out for d_in, d_out in shapes) + exact
    plain = indices = macs = dense = dense_macs = 0
    for name in users:
        user, (_, columns), (d_in, d_out) = layout.neurons[name], layout.shape(name), layout.host_shape(name)
        plain += user.experts * biased_outputs(user.role, columns, user.bias, user.scaled)
        plain += user.experts * user.top_k if user.scaled else 1
        indices += layout.selections(name) * user.top_k * (user.selection == name)
        macs += projection_macs(layout, name)
        dense += d_in * d_out + user.bias * d_out
        dense_macs += d_in * d_out
    return Size(
        stored=numbers + plain + indices,
        dense_stored=dense,
        bytes=size + plain * itemsize + indices * INDEX_ITEMSIZE,
        dense_bytes=dense * DENSE_ITEMSIZE,
        macs=macs,
        dense_macs=dense_macs,
    )


def projection_macs(layout: Layout, name: str) -> int:
    """Return the MACs per token of a replaced projection, as `Size` counts them."""
    if name in layout.projections:
        user = layout.projections[name]
        spec = layout.banks[user.bank]
        kind = FORMATS[spec.quantization]
        pair = kind.computed(user.top_k * spec.rank) * (spec.d_in + kind.computed(spec.d_out))
        if kind.multiple == 1 and user.experts == 1:  # it folds
            return min(pair, spec.d_in * spec.d_out)
        mixed = layout.mixing(name, user.top_k * (spec.rank if user.composition == "component" else 1))
        return layout.passes(name) * pair + mixed
    stored = layout.neuron_banks[layout.neurons[name].bank] if name in layout.neurons else layout.matrices[name]
    rows, columns = layout.shape(name)
    macs = layout.passes(name) * rows * FORMATS[stored.quantization].computed(columns)
    if name not in layout.neurons:
        return macs
    neurons = layout.neurons[name]
    own = neurons.top_k * neurons.scaled + biased_outputs(neurons.role, columns, neurons.bias, neurons.scaled)
    return macs + layout.mixing(name, own)


def block_macs(layout: Layout, block: str) -> int:
    """Return the MACs per token of the module `block`, by name below the base model: its projections and its router."""
    router = router_size(layout, block).macs if block in layout.routers else 0
    return router + sum(projection_macs(layout, name) for name in layout.replaced if name.startswith(f"{block}."))


def exits_size(layout: Layout, itemsize: int = DENSE_ITEMSIZE) -> Size:
    """Return the size of all exit gates with their substitutes; MACs are the gates', as of tokens that skip nothing."""
    exact = sum(one.d + 1 for one in layout.exits.values())
    plain = sum(one.d * (1 + 2 * one.substitute) for one in layout.exits.values())
    macs = sum(one.d for one in layout.exits.values())
    return Size(exact + plain, 0, exact * SCALE_ITEMSIZE + plain * itemsize, 0, macs, 0)


def router_size(layout: Layout, block: str, itemsize: int = DENSE_ITEMSIZE) -> Size:
    """Return the size of the router of a feed-forward block; the dense model has none.

    One of kind neurons stores no weights: it computes a neuron of each expert once more.
    """
    spec = layout.routers[block]
    macs = router_macs(spec)
    stored, exact = macs, spec.experts  # of the balance
    if spec.kind == "neurons":
        roles = [layout.neurons[name].role for name in layout.neurons if name.startswith(f"{block}.")]
        macs *= sum({"gate_up": 2, "down": 0}.get(role, 1) for role in roles)
        stored = 0
    return Size(stored + exact, 0, stored * itemsize + exact * SCALE_ITEMSIZE, 0, macs, 0)


def router_macs(spec: RouterSpec) -> int:
    """Count the MACs per token of a router, and as many weights; of kind neurons those of one matrix of the block."""
    inner = max(1, spec.width // NARROW)
    return inner * (spec.width + spec.experts) if spec.kind == "mlp" else spec.experts * spec.width


def target_sizes(layout: Layout, itemsize: int = DENSE_ITEMSIZE) -> dict[Target, Size]:
    """Return the size of all that the layout names by kind of block; ffn also where there is none.

    Exit gates and routers are of the ffn. MACs are those of a token that skips no block.
    """
    parts = [(next(iter(layout.users(bank)), ""), bank_size(layout, bank, itemsize)) for bank in layout.banks]
    parts += [(name, dense_size(layout, name, itemsize)) for name in layout.matrices]
    parts += [(next(iter(layout.users(bank)), ""), neuron_size(layout, bank, itemsize)) for bank in layout.neuron_banks]
    routers = [router_size(layout, block, itemsize) for block in layout.routers]
    found: dict[Target, Size] = {"ffn": sum(routers, exits_size(layout, itemsize))}
    for name, size in parts:
        found[target_of(name)] = found.get(target_of(name), NOTHING) + size
    return found


def ffn_size(layout: Layout, itemsize: int = DENSE_ITEMSIZE) -> Size:
    """Return the size of the feed-forward projections that the layout names."""
    return target_sizes(layout, itemsize)["ffn"]


def replaced_size(layout: Layout, itemsize: int = DENSE_ITEMSIZE) -> Size:
    """Everything that the layout names: projections and their banks, matrices, banks of neurons, routers, gates."""
    return sum(target_sizes(layout, itemsize).values(), NOTHING)


def target_ratios(
    layout: Layout, itemsize: int = DENSE_ITEMSIZE, source_itemsize: int = DENSE_ITEMSIZE
) -> dict[str, Sizes]:
    """Return the fields `ffn` and, where other projections are replaced, those of `results.sizes.Replaced`."""
    sizes = target_sizes(layout, itemsize)
    found = {str(target): size.over_dense(source_itemsize) for target, size in sizes.items()}
    if len(found) > 1:
        found["replaced_size"] = sum(sizes.values(), NOTHING).over_dense(source_itemsize)
    return found


def model_size(layout: Layout, dense: PreTrainedModel, itemsize: int = DENSE_ITEMSIZE) -> Size:
    """The whole model; `dense` is the host model before conversion, on any device (meta will do)."""
    replaced = replaced_size(layout, itemsize)
    parameters = sum(p.numel() for p in dense.parameters())  # tied weights once
    rest = parameters - replaced.dense_stored
    rest_macs = linear_macs(dense) - replaced.dense_macs
    size = rest * itemsize + sum(_rounded(dense, *entry, itemsize) for entry in layout.rest.items())
    return replaced + Size(rest, rest, size, rest * DENSE_ITEMSIZE, rest_macs, rest_macs)


def _rounded(dense: PreTrainedModel, place: str, kind: str, itemsize: int) -> int:
    """Change in bytes where a place (see `nn.rest`) is in integers; a tied head has no numbers of its own."""
    layer, _, number = kind.partition("-")
    if layer == "head":
        return 0
    module = dense.get_submodule(place[1:]) if place.startswith(".") else dense.base_model.get_submodule(place)
    weight = module.get_parameter("weight")
    columns, rows = weight.shape if type(module).__name__ == "Conv1D" else weight.shape[::-1]
    one = sum(grid_of(number).size(columns, 1)) if number else columns + SCALE_ITEMSIZE
    return rows * one - weight.numel() * itemsize


def linear_macs(model: nn.Module) -> int:
    """MACs per token of every dense linear projection of `model`, the language-model head included."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            d_in, d_out = linear_shape(module)
            total += d_in * d_out
    return total


def unchanged(dense: PreTrainedModel, layout: Layout) -> list[Share]:
    """Parameters that the layout leaves alone, by place, with their share of the dense model's, largest first."""
    replaced = {f"{name}." for name in layout.replaced}
    prefix = dense.base_model_prefix + "."
    groups: dict[str, int] = {}
    total = 0
    for name, parameter in dense.named_parameters():
        total += parameter.numel()
        local = name.removeprefix(prefix)
        if any(local.startswith(place) for place in replaced):
            continue
        words = [word for word in local.split(".")[:-1] if not word.isdigit()]
        group = ".".join(words[:3]) or local
        groups[group] = groups.get(group, 0) + parameter.numel()
    ordered = sorted(groups.items(), key=lambda item: -item[1])
    return [Share(name=name, parameters=count, share=count / total) for name, count in ordered]
