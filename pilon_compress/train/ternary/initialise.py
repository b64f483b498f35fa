"""A model of float factors becomes ternary, in place: what a ternary training goes on from.

equalise  the components of a primitive get factors of one size; compositions take over what they lose
round     digits and scales, the same for all layers that share a bank
refit     what stays floats, compositions, biases and scales of dense matrices: least squares on calibration inputs,
          projection after projection, each behind those that are done
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.convert.calibrate.damping import damped_solve
from pilon_compress.kernels.reference import LEAST, quantise
from pilon_compress.models.hooks import hooked
from pilon_compress.nn.additions import carry
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.fold import factors
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.installed import banks, dense_matrices, layout_of, projections
from pilon_compress.nn.layout import BANKS
from pilon_compress.nn.ternary_quantizer import restored

RIDGE = 1e-4  # of the mean diagonal: pulls towards what a composition was
SMALLEST = 0.1  # factor on a scale: nothing is turned round, or away
Layer = Any  # a ComposedLinear, or a matrix
Was = Callable[[Tensor], Tensor]  # what a projection computed as floats: (N, d_in) -> (N, d_out)


@torch.no_grad()
def ternarise(
    model: PreTrainedModel,
    grouped: Collection[str],
    inputs: Mapping[str, Any] | None,
    *,
    group: int = 0,
) -> None:
    """Replace banks and dense matrices by ternary ones. `grouped` and `group`: see `Layout.ternary`.

    `inputs`: keyword arguments of the base model, calibration text, on its device; where an `attention_mask` (B, T) is
    among them, its zeros do not count. None: nothing is refitted. Selections stay.
    """
    layout, ternary = layout_of(model).ternary(grouped, group), FORMATS["ternary"]
    layers: dict[str, Layer] = dict([*projections(model), *dense_matrices(model)])
    was = {name: _computes(layer) for name, layer in layers.items()}
    for name, bank in list(banks(model)):
        users = [layer for layer in layers.values() if isinstance(layer, ComposedLinear) and layer.bank is bank]
        equalise_components(bank, users)
        made = carry(bank, _filled(ternary.bank(bank.d_in, bank.d_out, bank.n_primitives, bank.rank), bank))
        model.base_model.set_submodule(f"{BANKS}.{name}", made)
        for user in users:
            object.__setattr__(user, "bank", made)  # borrowed: see `ComposedLinear`
    for name, layer in layers.items():
        if isinstance(layer, ComposedLinear):
            layer.group = layout.projections[name].group
        else:
            shape = (layer.in_features, layer.out_features, layer.bias is not None, layer.host_shape)
            made = _filled(ternary.matrix(*shape, layout.matrices[name].group), layer)
            layers[name] = made
            model.base_model.set_submodule(name, carry(layer, made))
    if inputs is not None:
        _refit(model, layers, was, inputs)


def _filled(made: Any, plain: nn.Module) -> Any:
    """`made`, a ternary module, with the parameters of `plain`."""
    made.load_state_dict(plain.state_dict(), strict=False)
    made.to(next(plain.parameters()).device).train(plain.training)
    return made


def _computes(layer: Layer) -> Was:
    """Return what `layer` computes as it is from its inputs, whatever becomes of it."""
    if isinstance(layer, ComposedLinear):
        A, B, bias = factors(layer)
        return lambda x: x @ A @ B if bias is None else x @ A @ B + bias
    weight, shift = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
    return lambda x: nn.functional.linear(x, weight, shift)


@torch.no_grad()
def equalise_components(bank: PrimitiveBank, users: Sequence[ComposedLinear]) -> None:
    """Give all components factors of one size, in place, without a change of what is computed.

    One scale for a primitive would round small components to nothing. Weights of components take over the sizes; where
    compositions have none, A and B share them evenly. A shift stands between A and the rest, so that A stays.
    """
    shifted = any(layer.affine()[1] is not None for layer in users)
    a, b = (one.square().mean(axis, keepdim=True).sqrt().clamp_min(LEAST) for one, axis in ((bank.A, 1), (bank.B, 2)))
    if all(layer.composition == "component" for layer in users):
        a, b = a / a.square().mean().sqrt(), b / b.square().mean().sqrt()
        a = torch.ones_like(a) if shifted else a
        for layer in users:
            layer.weight.mul_((a[:, 0] * b[:, :, 0])[layer.selected])
        bank.A.div_(a)
        bank.B.div_(b)
    elif not shifted:
        ratio = (b[:, :, 0] / a[:, 0]).sqrt()
        bank.A.mul_(ratio[:, None, :])
        bank.B.div_(ratio[:, :, None])


def _refit(
    model: PreTrainedModel, layers: Mapping[str, Layer], was: Mapping[str, Was], inputs: Mapping[str, Any]
) -> None:
    """Run a forward pass in which each projection is refitted when its inputs arrive, before it runs itself."""
    mask = inputs.get("attention_mask")
    counts = None if mask is None else mask.bool().flatten()

    def arrive(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        x = x if counts is None else x[counts]
        if isinstance(layer, ComposedLinear):
            refit_composition(layer, x, was[name](x))
        else:
            refit_scale(layer, x, was[name](x))

    training = model.training
    model.eval()
    try:
        with hooked(model.base_model, [(name, partial(arrive, name)) for name in layers]):
            model.base_model(**inputs)
    finally:
        model.train(training)


@torch.no_grad()
def refit_composition(layer: ComposedLinear, x: Tensor, wanted: Tensor) -> None:
    """Weights, and the bias where there is one, with the least squared error on `x` (N, d_in) to `wanted` (N, d_out).

    With z = x̂ A of all components, x̂ the codes' values, the error is quadratic in g: (ZᵀZ ∘ BBᵀ) g = diag(ZᵀY Bᵀ).
    Softmax weights stay.
    """
    bank, (selected, weight) = layer.bank, layer.coefficients()
    A, B = (one.double() for one in bank.primitives(selected))
    z = restored(*quantise(x, layer.group), layer.group).double() @ A.permute(1, 0, 2).reshape(bank.d_in, -1)
    factor, shift = bank.affine(weight.new_ones(len(selected), bank.rank).double())
    z = z * factor.flatten() if shift is None else z * factor.flatten() + shift.flatten()
    y, B = wanted.double(), B.reshape(-1, bank.d_out)
    means = z.mean(0), y.mean(0)
    if layer.bias is not None:
        z, y = z - means[0], y - means[1]
    if layer.composition != "softmax":
        square, right = (z.T @ z) * (B @ B.T), ((z.T @ y) * B).sum(1)
        if layer.composition == "scalar":
            shape = (len(selected), bank.rank)
            square, right = square.reshape(*shape, *shape).sum((1, 3)), right.reshape(shape).sum(1)
        start = weight.double().flatten()
        if bool(square.any()):  # else nothing ever reaches the layer: its weights stay
            square = square + RIDGE * square.diagonal().mean() * torch.eye(len(square), device=x.device)
            right = right + RIDGE * square.diagonal().mean() * start
            weight = damped_solve(square, right[:, None])[:, 0].reshape(weight.shape)
            layer.weight.copy_(weight)
    if layer.bias is not None:
        mixed = means[0] * weight.double().expand(len(selected), bank.rank).flatten()
        layer.bias.copy_(means[1] - mixed @ B)


@torch.no_grad()
def refit_scale(layer: Any, x: Tensor, wanted: Tensor) -> None:
    """Refit the scale of a ternary matrix, and the bias, to the outputs `wanted`, like `refit_composition`.

    The numbers are scaled, so that their digits stay and their mean magnitude is the scale.
    """
    y = wanted.double()
    found = restored(*quantise(x, layer.group), layer.group).double() @ layer.matrix().double()
    means = found.mean(0), y.mean(0)
    if layer.bias is not None:
        found, y = found - means[0], y - means[1]
    factor = ((found * y).sum() / found.square().sum().clamp_min(LEAST)).clamp_min(SMALLEST)
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.copy_(means[1] - means[0] * factor)
