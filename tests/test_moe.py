"""Experts over one bank: routing against a plain sum over experts, files, sizes, formats, training, refusals."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM

import pilon_compress  # noqa: F401  registers the quantisation method
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.export.dense import refuse as refuse_dense
from pilon_compress.export.packed import refuse as refuse_packed
from pilon_compress.export.registry import DEFAULTS
from pilon_compress.export.save import save_model
from pilon_compress.models.base_architectures import balance_experts
from pilon_compress.models.families import find_sites
from pilon_compress.nn.experts import add_experts
from pilon_compress.nn.fold import fold, foldable
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import layout_of, neuron_projections, projections, routers
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.neuron_linear import has_scale
from pilon_compress.nn.router import MIXES, Router
from pilon_compress.nn.size import ffn_size
from pilon_compress.nn.specs import BankSpec, NeuronBankSpec, NeuronSpec, ProjectionSpec, RouterSpec
from pilon_compress.train.expert_start import refit, start

IDS = torch.randint(6, 200, (2, 9), generator=torch.Generator().manual_seed(3))


def factors(model, router, quantization="none"):
    """One bank for each role of all three layers: 6 primitives of rank 4, of which each recipe selects 3."""
    sites = find_sites(model)
    banks = {site.role: BankSpec(site.d_in, site.d_out, 6, 4, quantization) for site in sites}
    users = {site.name: ProjectionSpec(site.role, 3, site.bias, experts=router.recipes) for site in sites}
    blocks = {site.name.rpartition(".")[0] for site in sites}
    return Layout(banks, users, routers=dict.fromkeys(sorted(blocks), router))


def neurons(model, router, quantization="none"):
    """One bank of 40 neurons for all three layers, of which each recipe selects 12."""
    sites = find_sites(model)
    gated = any(site.role in ("gate", "gate_up") for site in sites)
    first = {site.layer: site.name for site in reversed(sites)}
    users = {
        site.name: NeuronSpec(
            "all", site.role, 12, site.bias, first[site.layer], has_scale(site.role, gated), router.recipes
        )
        for site in sites
    }
    host = {site.name: (site.d_in, site.d_out) for site in sites}
    bank = NeuronBankSpec(40, 32, 32, gated, quantization)
    blocks = {site.name.rpartition(".")[0] for site in sites}
    routers = dict.fromkeys(sorted(blocks), router)
    return Layout({}, {}, {}, host, neuron_banks={"all": bank}, neurons=users, routers=routers)


FORMS = {"factors": factors, "neurons": neurons}
FAMILIES = {"llama": ("layers.1.mlp", functional.silu), "arcee": ("layers.1.mlp", lambda x: torch.relu(x).square())}
FAMILIES |= {"phi3": ("layers.1.mlp", functional.silu)}
FAMILIES |= {"gpt2": ("h.1.mlp", lambda x: functional.gelu(x, approximate="tanh"))}


def pilon(tiny, family="llama", form="factors", router=RouterSpec(32, 4, 2), quantization="none"):  # noqa: B008
    model = tiny.tiny_model(family)
    install(model, FORMS[form](model, router, quantization))
    generator = torch.Generator().manual_seed(1)
    initialise(model, 0.3, generator)
    balance_experts(model, generator)
    with torch.no_grad():
        for _, layer in (*projections(model), *neuron_projections(model)):
            if layer.weight.is_floating_point() and layer.weight.requires_grad:
                layer.weight.mul_(1 + 0.3 * torch.randn(layer.weight.shape, generator=generator))
            if layer.bias is not None:
                layer.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def matrices(layer, expert):
    """The matrix (d_in, d_out) and the bias of one expert of a projection, in float64; of several by their weights."""
    own = layer.router.mix == "outputs"
    share = torch.eye(layer.experts, dtype=torch.float64)[expert] if isinstance(expert, int) else expert
    place = expert if own else 0

    def mixed(tensor):
        return torch.tensordot(share, tensor.double(), 1)

    if hasattr(layer, "spread"):
        A, B = layer.bank.primitives(layer.selected[place] if own else layer.selected)
        bias = 0.0 if layer.bias is None else layer.bias.double()
        return (A.double() @ (mixed(layer.weight)[:, :, None] * B.double())).sum(0), bias
    chosen = layer.selection(place)
    parts = [layer.bank.part(role, chosen).double() for role in layer.sources]
    if layer.scaled:
        scale = mixed(layer.weight)
        parts[0] = parts[0] * (scale[:, None] if layer.role == "down" else scale)
    bias = torch.zeros(layer.out_features, dtype=torch.float64)
    if layer.bias is not None:
        bias[: layer.bias.shape[1]] = mixed(layer.bias)
    return torch.cat(parts, 1), bias


def plain_block(block, x, act):
    """The block in float64: every expert computes every token, and the router's weights are 0 for most of them."""
    layers = [module for module in block.modules() if hasattr(module, "router") and hasattr(module, "bank")]
    *enter, down = layers
    scores = block.router.logits(x).softmax(-1).double()
    chosen = (scores + block.router.balance).topk(block.router.top_k).indices
    picked = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * scores
    weights = picked / picked.sum(-1, keepdim=True)
    shared = torch.ones(*x.shape[:-1], block.router.shared, dtype=torch.float64)
    weights = torch.cat([shared, weights], -1)

    def computed(rows, expert):
        inner = [rows @ matrix + bias for matrix, bias in (matrices(layer, expert) for layer in enter)]
        if len(inner) == 1 and inner[0].shape[-1] == 2 * matrices(down, expert)[0].shape[0]:
            inner = inner[0].chunk(2, -1)
        matrix, bias = matrices(down, expert)
        return (act(inner[0]) * inner[1] if len(inner) == 2 else act(inner[0])) @ matrix + bias

    if block.router.mix == "outputs":
        return sum(weights[..., e, None] * computed(x, e) for e in range(block.router.recipes))
    rows = [computed(row, share) for row, share in zip(x.flatten(0, -2), weights.flatten(0, -2), strict=True)]
    return torch.stack(rows).view_as(x)


ROUTERS = [RouterSpec(32, 4, 2), RouterSpec(32, 3, 1, "mlp", 1), RouterSpec(32, 3, 2, "mlp", 1, "recipes")]
CASES = [
    (family, router) for family in FAMILIES for router in (ROUTERS if family in ("llama", "gpt2") else ROUTERS[:1])
]
CASES += [("llama", RouterSpec(32, 4, 4)), ("arcee", RouterSpec(32, 4, 2, mix="recipes"))]


@pytest.mark.parametrize(("family", "router"), CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_block_is_the_weighted_sum_of_its_experts(tiny, family, form, router):
    model = pilon(tiny, family, form, router).double()
    path, act = FAMILIES[family]
    block, x = model.base_model.get_submodule(path), torch.randn(2, 7, 32, dtype=torch.float64)
    block.router.balance.copy_(torch.linspace(-0.1, 0.1, router.experts))
    torch.testing.assert_close(block(x), plain_block(block, x, act), rtol=1e-11, atol=1e-11)
    assert block(x[:, :0]).shape == (2, 0, 32)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_tokens_are_routed_each_for_itself(tiny, form, mix):
    model, x = (
        pilon(tiny, form=form, router=RouterSpec(32, 4, 2, mix=mix)).double(),
        torch.randn(11, 32, dtype=torch.float64),
    )
    order = torch.randperm(11)
    block = model.model.layers[0].mlp
    torch.testing.assert_close(block(x)[order], block(x[order]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(block(x)[3:4], block(x[3:4]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_plain_sum(tiny, form, mix):
    model = pilon(tiny, form=form, router=RouterSpec(32, 4, 2, mix=mix)).double()
    block, x = model.model.layers[1].mlp, torch.randn(13, 32, dtype=torch.float64, requires_grad=True)
    tensors = [x, *block.parameters(), *model.model.pilon_banks.parameters()]
    ours = torch.autograd.grad(block(x).square().sum(), tensors)
    plain = torch.autograd.grad(plain_block(block, x, functional.silu).square().sum(), tensors)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().sum() > 0 for gradient in ours)


@pytest.mark.parametrize("quantization", ["none", "ternary"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("family", "form"), [("llama", "factors"), ("gpt2", "neurons")])
def test_a_saved_model_loads_to_the_same_bits_and_size(tiny, tmp_path, family, form, mix, quantization):
    model = pilon(tiny, family, form, RouterSpec(32, 4, 2, "mlp", 1, mix), quantization)
    next(routers(model))[1].balance.fill_(0.123456789)
    save_model(model, tiny.tiny_tokenizer(), tmp_path / "m", torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert torch.equal(next(routers(loaded))[1].balance, next(routers(model))[1].balance)
    assert layout_of(loaded) == layout_of(model) and layout_of(model).routers
    save_model(loaded, tiny.tiny_tokenizer(), tmp_path / "again", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, again(IDS).logits)
    tokens = [one.generate(IDS, max_new_tokens=6, do_sample=False) for one in (loaded, again)]
    assert torch.equal(*tokens)
    layout = Layout.from_dict(json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["layout"])
    with safe_open(tmp_path / "again/model.safetensors", "pt") as file:
        ours = [file.get_tensor(key) for key in file.keys() if ".mlp." in key or "pilon_banks." in key]  # noqa: SIM118
    size = ffn_size(layout, 4)
    assert size.stored == sum(tensor.numel() for tensor in ours)
    assert size.bytes == sum(tensor.numel() * tensor.element_size() for tensor in ours)


def test_macs_are_those_of_the_active_experts_and_the_router(tiny):
    model = tiny.tiny_model("arcee")
    size = ffn_size(factors(model, RouterSpec(32, 4, 2, shared=1)))
    assert size.macs == 3 * (3 * 2 * 12 * (32 + 64) + 4 * 32)
    with torch.no_grad():
        narrow = ffn_size(neurons(model, RouterSpec(32, 4, 2, "mlp")))
    assert narrow.macs == 3 * (2 * 12 * (32 + 32) + 8 * (32 + 4))
    mixed = ffn_size(factors(model, RouterSpec(32, 4, 2, mix="recipes")))
    assert mixed.macs == 3 * (2 * (12 * (32 + 64) + 4 * 12) + 4 * 32)


def test_inspect_names_the_experts(tiny, tmp_path, cli):
    save_model(pilon(tiny), tiny.tiny_tokenizer(), tmp_path / "m", torch.float32)
    found = anatomy(str(tmp_path / "m"))
    assert {part.experts for part in found.parts} == {4} and {part.active for part in found.parts} == {2}
    assert sum(part.macs for part in found.parts) == found.ffn.macs == ffn_size(layout_of(pilon(tiny))).macs
    assert sum(part.stored for part in found.parts) == found.ffn.stored
    printed = cli("inspect", str(tmp_path / "m")).stdout
    assert "2 of 4 experts" in printed and "router" in printed


def test_what_experts_cannot_do_is_refused(tiny):
    model = pilon(tiny)
    assert not foldable(model)
    with pytest.raises(ValueError, match="experts do not fold"):
        fold(model)
    for refuse in (refuse_dense, refuse_packed):
        assert "experts" in refuse(model, DEFAULTS)
    with pytest.raises(RuntimeError, match="within their block"):
        model.model.layers[0].mlp.up_proj(torch.randn(2, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["routers"]["layers.0.mlp"].update(top_k=5), "chooses 5 of 4"),
        (lambda d: d["routers"]["layers.0.mlp"].update(kind="hash"), "not known"),
        (lambda d: d["routers"].pop("layers.0.mlp"), "its block another number"),
        (lambda d: d["projections"]["layers.0.mlp.up_proj"].pop("experts"), "its block another number"),
        (
            lambda d: d["routers"].update({"layers.9.mlp": {"width": 32, "experts": 4, "top_k": 2}}),
            "no projections there",
        ),
        (lambda d: d["projections"]["layers.0.mlp.up_proj"].update(composition="softmax"), "softmax"),
    ],
)
def test_damaged_layouts_are_refused_in_one_line(tiny, change, message):
    plain = factors(tiny.tiny_model("llama"), RouterSpec(32, 4, 2)).to_dict()
    assert Layout.from_dict(json.loads(json.dumps(plain)))
    change(plain)
    with pytest.raises(ValueError, match=message) as refusal:
        Layout.from_dict(plain)
    assert "\n" not in str(refusal.value)


def test_a_block_with_attention_inside_is_refused(tiny):
    model = tiny.tiny_model("opt")
    layout = factors(model, RouterSpec(32, 4, 2))
    layout = replace(layout, routers={name: RouterSpec(32, 4, 2) for name in layout.routers})
    with pytest.raises(ValueError, match="beside its projections"):
        install(model, layout)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_copies_of_a_static_recipe_change_nothing_and_a_refit_finds_each_expert(tiny, form, mix):
    """The last projection of an expert is refitted to outputs that another composition made: it becomes that one."""
    model = tiny.tiny_model("arcee")
    layout = FORMS[form](model, RouterSpec(32, 2, 1, mix=mix))
    plain = {name: replace(spec, experts=1) for name, spec in layout.projections.items()}
    install(
        model,
        replace(
            layout,
            routers={},
            projections=plain,
            neurons={name: replace(spec, experts=1) for name, spec in layout.neurons.items()},
        ),
    )
    initialise(model, 0.3, torch.Generator().manual_seed(0))
    before = model(IDS).logits
    add_experts(model, layout.routers)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-5)
    assert layout_of(model) == layout
    down = model.model.layers[1].mlp.down_proj
    hidden, static = torch.randn(400, down.in_features), down.weight.clone()
    down.weight[1].normal_()
    wanted, made = down.weight[1].clone(), hidden @ matrices(down, 1)[0].float()
    down.weight.copy_(static)
    refit(down, 1, hidden, made, torch.rand(400))
    error = (down.weight[1] - wanted).norm() / (static[1] - wanted).norm()
    assert error < 0.05 and torch.equal(down.weight[0], static[0]), "a ridge holds on to the static recipe"


@torch.no_grad()
def test_a_router_begins_at_clusters_of_tokens():
    centres = torch.nn.functional.normalize(torch.randn(3, 24), dim=1)
    labels = torch.arange(300) % 3
    rows = 5 * centres[labels] + 0.3 * torch.randn(300, 24) + torch.full((24,), 2.0)
    router = Router(24, 3, 1)
    start(router, rows, 0)
    found = router.logits(rows).argmax(1)
    assert all(len(found[labels == one].unique()) == 1 for one in range(3)) and len(found.unique()) == 3
    scores = router.logits(rows).softmax(1)
    assert torch.special.entr(scores).sum(1).mean() / torch.tensor(3.0).log() == pytest.approx(0.5, abs=0.01)
