"""Starting weights for a PILON model that is trained from scratch."""

import torch

from pilon_compress.nn.installed import dense_matrices, neuron_banks, neuron_projections, projections, routers
from pilon_compress.nn.layout import Host

APART = 0.3  # standard deviation of what recipes that a router mixes have of their own, over what they have in common


@torch.no_grad()
def initialise(model: Host, std: float, generator: torch.Generator | None = None) -> Host:
    """Draw banks and compositions so that every projection's output variance equals that of a dense N(0, std²) weight.

    A composed weight is a sum of k·r products a·g·b, so Var W = k·r · Var a · E[g²] · Var b, which is set to std².
    Component and scalar weights start as random signs, so that layers which share a bank start apart; softmax logits
    near zero, hence weights near 1/k. A and B get the same scale. Dense matrices and banks of neurons are drawn as
    the dense model is, with scales of 1 and biases of 0.
    Ternary ones are scaled so that the variance is right as their digits have it, which is less than the numbers' own.
    """
    done: set[int] = set()
    for _, composed in projections(model):
        bank, k = composed.bank, composed.top_k
        softmax = composed.composition == "softmax"
        composed.weight.normal_(0, 0.01, generator=generator)
        if not softmax:
            composed.weight.sign_()
        if composed.experts > 1 and composed.selected.dim() == 1:  # mixed recipes begin alike: they would cancel
            apart = torch.empty_like(composed.weight).normal_(0, APART, generator=generator)
            composed.weight.copy_(composed.weight[:1] * (1 + apart))
        if composed.bias is not None:
            composed.bias.zero_()
        if composed.composition != "softmax":
            picked = torch.randperm(bank.n_primitives, generator=generator)[:k].sort().values
            composed.selected.copy_(picked)
        if id(bank) in done:
            continue
        done.add(id(bank))
        weight_square = 1 / k**2 if softmax else 1.0
        factor_std = (std**2 / (k * bank.rank * weight_square)) ** 0.25
        bank.draw(factor_std, generator)
    for _, matrix in dense_matrices(model):
        matrix.draw(std, generator)
        if matrix.bias is not None:
            matrix.bias.zero_()
    for _, store in neuron_banks(model):
        store.draw(std, generator)
    for _, layer in neuron_projections(model):
        layer.weight.fill_(1)
        if layer.bias is not None:
            layer.bias.zero_()
    for _, router in routers(model):
        router.draw(std, generator)
    return model
