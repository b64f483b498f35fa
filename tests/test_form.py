"""The form against slow float64 references written from its definition."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from transformers import BertConfig, BertModel

from pilon_compress.nn.additions import add, added
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.composed_linear import COMPOSITIONS, ComposedLinear
from pilon_compress.nn.fold import dense, factors, fold, prune_unused
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import banks, layout_of, projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.specs import BankSpec, ProjectionSpec


def composed(composition="component", latent=True, dtype=torch.float64, n=5, r=3, k=2, d_in=7, d_out=6):
    torch.manual_seed(0)
    bank = PrimitiveBank(d_in, d_out, n, r)
    for kind in ("latent_scale", "latent_bias") if latent else ():
        add(bank, "original", kind)
    bank.to(dtype)
    layer = ComposedLinear(bank, k, bias=True, composition=composition).to(dtype)
    for parameter in [*bank.parameters(), *layer.parameters()]:
        nn.init.normal_(parameter)
    if composition != "softmax":
        layer.selected.copy_(torch.tensor([4, 1])[:k])
    return layer


def reference(layer, x):
    """y = Σ_p [(x A_p) · s + b] · g_p  B_p + bias, one primitive, component and row at a time."""
    bank, n = layer.bank, layer.bank.n_primitives
    if layer.composition == "softmax":
        weights = layer.weight[:, 0].softmax(0)
        chosen = weights.topk(layer.top_k).indices
        g = {int(p): [(weights[p] / weights[chosen].sum()).item()] * bank.rank for p in chosen}
    else:
        g = {int(p): layer.weight[i].expand(bank.rank).tolist() for i, p in enumerate(layer.selected)}
    assert set(g) <= set(range(n))
    y = torch.zeros(len(x), bank.d_out, dtype=torch.float64)
    for p, weight in g.items():
        for c in range(bank.rank):
            u = x @ bank.A[p, :, c]
            if added(bank):
                u = u * bank.latent_scale[c] + bank.latent_bias[c]
            y += torch.outer(u * weight[c], bank.B[p, c])
    return y + layer.bias


def pilon_bert(bands=((0, 1), (2,)), top_k=2, composition="component", n=4, r=2):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0,
    )
    model = BertModel(config).eval()
    specs, users = {}, {}
    for b, band in enumerate(bands):
        for role, path, shape in (("up", "intermediate.dense", (16, 24)), ("down", "output.dense", (24, 16))):
            specs[f"band{b}.{role}"] = BankSpec(*shape, n, r)
            for layer in band:
                users[f"encoder.layer.{layer}.{path}"] = ProjectionSpec(f"band{b}.{role}", top_k, True, composition)
    return install(model, Layout(specs, users))


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("latent", [False, True])
def test_forward_equals_the_definition(composition, latent):
    layer = composed(composition, latent)
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-12, atol=1e-12)


class Holder(nn.Module):
    """Owns bank and layer, as a model does, so that torch.func can swap the parameters of both."""

    def __init__(self, layer):
        super().__init__()
        self.bank, self.layer = layer.bank, layer

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_gradients_of_bank_and_composition(composition):
    holder = Holder(composed(composition))
    names, tensors = zip(*holder.named_parameters(), strict=True)
    assert {"bank.A", "bank.B", "bank.latent_scale", "bank.latent_bias", "layer.weight", "layer.bias"} == set(names)

    def run(x, *values):
        return functional_call(holder, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (x, *(t.detach().clone().requires_grad_() for t in tensors)))


def test_unselected_primitives_change_nothing():
    layer = composed()
    x = torch.randn(3, 7, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.bank.A[[0, 2, 3]] += 1
        layer.bank.B[[0, 2, 3]] += 1
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("latent", [False, True])
def test_folding_to_two_gemms_and_to_one(composition, latent):
    layer = composed(composition, latent)
    x = torch.randn(4, 7, dtype=torch.float64)
    A, B, bias = factors(layer)
    assert A.shape == (7, 6) and B.shape == (6, 6)
    torch.testing.assert_close(x @ A @ B + bias, layer(x), rtol=1e-10, atol=1e-10)
    W, bias = dense(layer)
    torch.testing.assert_close(x @ W + bias, layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("top_k", "kind"), [(2, nn.Sequential), (4, nn.Linear)])
def test_folded_model_is_plain_and_computes_the_same(top_k, kind):
    model = initialise(pilon_bert(top_k=top_k, n=6, r=2 if top_k == 2 else 4), 0.02).eval()
    ids = torch.randint(0, 50, (2, 9))
    before = model(ids).last_hidden_state
    folded = fold(copy.deepcopy(model))
    assert isinstance(folded.encoder.layer[0].intermediate.dense, kind)
    assert not list(banks(folded)) and not hasattr(folded, "pilon_banks")
    torch.testing.assert_close(folded(ids).last_hidden_state, before, rtol=1e-4, atol=1e-5)


def test_banks_are_owned_once_and_shared_by_their_band_only():
    model = initialise(pilon_bert(), 0.02)
    keys = [key for key in model.state_dict() if key.endswith(".A")]
    assert sorted(keys) == sorted(f"pilon_banks.band{b}.{role}.A" for b in (0, 1) for role in ("up", "down"))
    by_name = dict(projections(model))
    first = by_name["encoder.layer.0.intermediate.dense"].bank
    assert first is by_name["encoder.layer.1.intermediate.dense"].bank
    assert first is not by_name["encoder.layer.2.intermediate.dense"].bank
    twin = copy.deepcopy(model)
    shared = [p.bank for name, p in projections(twin) if name.endswith("intermediate.dense")]
    assert shared[0] is shared[1] is not first, "a deep copy must borrow from its own banks"


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_pruning_unused_primitives_keeps_outputs_bit_equal(composition):
    model = initialise(pilon_bert(n=8, composition=composition), 0.02).eval()
    with torch.no_grad():
        for _, layer in projections(model):
            if composition == "softmax":
                layer.weight[:, 0] = torch.tensor([0.0, -1, -2, 1, -3, -4, 2, -5])
            else:
                layer.selected.copy_(torch.tensor([6, 3]))
    ids = torch.randint(0, 50, (2, 9))
    before = model(ids).last_hidden_state
    assert prune_unused(model) == 4 * 6
    assert torch.equal(model(ids).last_hidden_state, before)
    assert {spec.n_primitives for spec in layout_of(model).banks.values()} == {2}


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_initialisation_matches_the_dense_output_variance(composition):
    generator = torch.Generator().manual_seed(0)
    bank = PrimitiveBank(256, 512, 12, 16)
    layers = nn.ModuleList([ComposedLinear(bank, 6, False, composition) for _ in range(3)])
    host = nn.Module()
    host.add_module("layers", layers)
    host.add_module("bank", bank)
    host.base_model = host
    initialise(host, 0.02, generator)
    x = torch.randn(2000, 256, generator=generator)
    wanted = 256 * 0.02**2
    for layer in layers:
        assert layer(x).var().item() == pytest.approx(wanted, rel=0.35)
    assert not torch.allclose(layers[0](x), layers[1](x)), "layers of a band must start apart"


def test_layout_round_trips_and_refuses_what_it_does_not_know():
    model = pilon_bert(composition="scalar")
    layout = layout_of(model)
    assert Layout.from_dict(layout.to_dict()) == layout
    data = layout.to_dict()
    data["banks"]["band0.up"]["packing"] = "ternary"
    with pytest.raises(ValueError, match="packing"):
        Layout.from_dict(data)
    data = layout.to_dict()
    del data["banks"]["band1.down"]
    with pytest.raises(ValueError, match="band1.down"):
        Layout.from_dict(data)


def test_install_refuses_another_architecture():
    layout = layout_of(pilon_bert())
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    with pytest.raises(ValueError, match=r"encoder\.layer\.2"):
        install(BertModel(config), layout)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match="in the layout"):
        install(BertModel(config), layout)


def test_autocast_and_half_precision_run():
    model = initialise(pilon_bert(), 0.02).to(torch.bfloat16)
    assert model(torch.randint(0, 50, (1, 4))).last_hidden_state.dtype == torch.bfloat16
