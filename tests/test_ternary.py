"""The ternary quantiser and banks: exact whole-number arithmetic, independent of other tokens, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilon_compress.kernels.reference import LEVELS, quantise
from pilon_compress.nn.additions import add, added
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.formats.ternary import TernaryBank, TernaryLinear
from pilon_compress.nn.ternary_quantizer import digits, restored
from pilon_compress.research.bitnet.training import GradualRounding


def composed(d_in=48, d_out=40, n=5, r=8, k=3, seed=0, group=0, latent=()) -> ComposedLinear:
    torch.manual_seed(seed)
    bank = TernaryBank(d_in, d_out, n, r)
    for kind in latent:
        add(bank, "original", kind)
    layer = ComposedLinear(bank, k, bias=True, group=group)
    for parameter in [*bank.parameters(), *layer.parameters()]:
        torch.nn.init.normal_(parameter)
    layer.selected.copy_(torch.randperm(n)[:k].sort().values)
    return mode(layer, False)


def mode(layer: ComposedLinear, training: bool) -> ComposedLinear:
    layer.bank.train(training)
    return layer.train(training)


def by_whole_numbers(layer: ComposedLinear, x: torch.Tensor) -> torch.Tensor:
    """The definition in int64 and float32, token by token and primitive by primitive."""
    bank, group = layer.bank, layer.group or layer.bank.d_in
    A_scale, B_scale = bank.scales()
    rows = []
    for token in x:
        u = []
        for index, p in enumerate(layer.selected.tolist()):
            t = (bank.A[p] / A_scale[p]).round().clamp(-1, 1).long()
            total = None
            for start in range(0, bank.d_in, group):
                codes, scale = codes_of(token[start : start + group])
                part = (codes[:, None] * t[start : start + group]).sum(0).float() * scale
                total = part if total is None else total + part
            weight, latent = layer.weight[index], [kind for _, kind in added(bank)]
            g = weight * bank.latent_scale if "latent_scale" in latent else weight
            b = B_scale[p].expand(bank.rank, 1)[:, 0]
            value = total * (A_scale[p].expand(1, bank.rank)[0] * g * b)
            u.append(value + weight * bank.latent_bias * b if "latent_bias" in latent else value)
        codes, scale = codes_of(torch.cat(u))
        t = torch.cat([(bank.B[p] / B_scale[p]).round().clamp(-1, 1).long() for p in layer.selected.tolist()])
        rows.append((codes[:, None] * t).sum(0).float() * scale)
    return torch.stack(rows) + layer.bias


def codes_of(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = v.abs().max().clamp_min(1e-20)
    return (v * (LEVELS / largest)).round().long(), largest / LEVELS


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("latent", [(), ("latent_scale", "latent_bias"), ("latent_bias",)])
@torch.no_grad()
def test_the_forward_pass_is_the_definition_bit_for_bit(latent, group):
    layer = composed(group=group, latent=latent)
    x = torch.randn(7, 48) * torch.logspace(-3, 3, 7)[:, None]
    assert torch.equal(layer(x), by_whole_numbers(layer, x))


@given(st.integers(1, 70), st.integers(0, 40), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_codes_stay_within_half_a_step_and_know_no_other_token(d, group, seed):
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 9 - 4)
    codes, scales = quantise(x, group)
    assert codes.abs().max() <= LEVELS and torch.equal(codes, codes.round())
    steps = scales.repeat_interleave(group or d, -1)[:, :d]
    assert ((restored(codes, scales, group) - x).abs() <= steps * 0.5001).all()
    alone, its_scale = quantise(x[1], group)
    assert torch.equal(alone, codes[1]) and torch.equal(its_scale, scales[1])


@torch.no_grad()
def test_zeros_and_extremes():
    codes, scales = quantise(torch.tensor([[0.0, 0.0], [1e30, -1e30], [1e-30, 0.0]]))
    assert codes[:2].tolist() == [[0, 0], [127, -127]] and torch.isfinite(scales).all()
    layer = composed()
    assert torch.equal(layer(torch.zeros(2, 48)), layer.bias.expand(2, -1))


@torch.no_grad()
def test_batches_prefixes_and_selections_do_not_matter():
    layer, x = composed(group=16), torch.randn(4, 9, 48)
    whole = layer(x)
    assert torch.equal(layer(x[2:3, :5]), whole[2:3, :5])
    other = ComposedLinear(layer.bank, 1, bias=False)
    other.selected.copy_(layer.selected[:1])
    assert torch.equal(layer.bank.digits(other.selected)[0], layer.bank.digits(layer.selected)[0][:1])


@pytest.mark.parametrize("group", [0, 16])
def test_training_computes_what_evaluation_does(group):
    layer, x = composed(group=group), torch.randn(6, 48)
    expected = layer(x)
    assert torch.allclose(mode(layer, True)(x), expected, rtol=1e-4, atol=1e-4)
    layer.bank.hold()
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_held_digits_give_the_same_gradients():
    x, found = torch.randn(6, 48), []
    for held in (False, True):
        layer = mode(composed(), True)
        if held:
            layer.bank.hold()
        layer(x).square().sum().backward()
        found += [layer.bank.A.grad, layer.bank.B.grad]
        used = torch.zeros(5, dtype=torch.bool)
        used[layer.selected] = True
        assert (layer.bank.A.grad[used] != 0).any() and not layer.bank.A.grad[~used].any()
        assert layer.weight.grad.abs().min() > 0
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found[:2], found[2:], strict=True))


def test_the_gradient_of_digits_is_straight_through():
    weight = torch.tensor([[-2.0, -0.2, 0.3, 0.7]], requires_grad=True)
    (digits(weight, torch.tensor(0.5)) * 0.5).sum().backward()
    assert torch.allclose(weight.grad, torch.ones(1, 4))


def test_strength_leads_from_the_latent_numbers_to_the_digits():
    layer, x = mode(composed(), True), torch.randn(6, 48)
    exact = layer(x)
    layer.bank.rounding = GradualRounding()
    A, B = (layer.bank.A[layer.selected], layer.bank.B[layer.selected])
    plain = torch.einsum("td,kdr,kr,kro->to", x, A, layer.weight, B) + layer.bias
    assert torch.allclose(layer(x), plain, rtol=1e-4, atol=1e-3)
    layer.bank.rounding.strength.fill_(1.0)
    assert torch.allclose(layer(x), exact, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_kept_matrices():
    torch.manual_seed(0)
    layer = TernaryLinear(40, 24, True, (40, 32), group=16).eval()
    add(layer, "bitnet", "sub_norm")
    layer.norm.weight.uniform_(0.5, 2)
    x = torch.randn(5, 40)
    t = (layer.weight / layer.scales()).round().clamp(-1, 1)
    assert torch.allclose(layer.matrix(), (t * layer.scales()).T)
    approximate = layer.norm(x) @ layer.matrix() + layer.bias
    assert (layer(x) - approximate).norm() < 0.02 * approximate.norm()
    assert torch.allclose(layer.train()(x), layer.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bank", "matrix"])
def test_a_centred_part_computes_the_same_and_small_steps_flip_no_digit_that_stood_on_an_edge(kind):
    torch.manual_seed(0)
    part = TernaryBank(64, 48, 3, 16) if kind == "bank" else TernaryLinear(64, 48, False, (64, 48))
    parameters = [part.A, part.B] if kind == "bank" else [part.weight]
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
        edge = torch.rand_like(parameter) < 0.2  # a fifth of the numbers stand where digits change
        for _ in range(40):  # which moves the scale
            scale = parameter.detach().abs().mean((-2, -1), keepdim=True)
            parameter.data = torch.where(edge, 0.5 * scale * parameter.sign(), parameter)
    codes, scales = part.codes(), [scale.clone() for scale in tuple(part.scales())]

    def step() -> int:
        for parameter in parameters:
            parameter.data.sub_(1e-3 * parameter.abs().mean() * torch.randn_like(parameter).sign())
        return int((part.codes() != codes).sum())

    kept = [parameter.clone() for parameter in parameters]
    assert step() > 0.05 * len(codes)
    for parameter, old in zip(parameters, kept, strict=True):
        parameter.data.copy_(old)
    part.centre(0.1)
    assert torch.equal(part.codes(), codes)
    for new, old in zip(tuple(part.scales()), scales, strict=True):
        torch.testing.assert_close(new, old)
    assert step() == 0
