"""Banks of neurons against plain float64 blocks: forward, gradients, files, sizes, formats, folding, refusals."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM

import pilon_compress  # noqa: F401  registers the quantisation method
from pilon_compress.config import training
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.export.dense import to_dense
from pilon_compress.export.packed import packed
from pilon_compress.export.save import save_model
from pilon_compress.models.families import find_sites
from pilon_compress.nn.fold import fold, foldable
from pilon_compress.nn.formats.registry import FORMATS
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import layout_of, neuron_banks, neuron_blocks, neuron_projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.neuron_bank import NeuronBank
from pilon_compress.nn.neuron_linear import fill_block, has_scale, neuron_block
from pilon_compress.nn.size import ffn_size
from pilon_compress.nn.specs import NeuronBankSpec, NeuronSpec
from pilon_compress.train.preflight import check

NEURONS, TOP_K = 48, 40
IDS = torch.randint(6, 200, (2, 9), generator=torch.Generator().manual_seed(3))


def layout_for(model, neurons=NEURONS, top_k=TOP_K, scaled=True, quantization="none"):
    """Layers 0 and 1 share a bank, layer 2 has one of its own."""
    sites = find_sites(model)
    gated = any(site.role in ("gate", "gate_up") for site in sites)
    width = next(site.d_out for site in sites if site.role == "down")
    banks = {f"band{b}": NeuronBankSpec(neurons, width, width, gated, quantization) for b in (0, 1)}
    first = {site.layer: site.name for site in reversed(sites)}
    users = {
        site.name: NeuronSpec(
            f"band{int(site.layer == 2)}",
            site.role,
            top_k,
            site.bias,
            first[site.layer] if top_k < neurons else "",
            scaled and has_scale(site.role, gated),
        )
        for site in sites
    }
    return Layout({}, {}, {}, {s.name: (s.d_in, s.d_out) for s in sites}, neuron_banks=banks, neurons=users)


def pilon(tiny, family, heads="lm", scattered=True, **options):
    model = tiny.tiny_model(family, heads)
    install(model, layout_for(model, **options))
    generator = torch.Generator().manual_seed(1)
    initialise(model, 0.1, generator)
    with torch.no_grad():
        for block in neuron_blocks(model):
            for layer in block.values():
                if layer.scaled:
                    layer.weight.normal_(1, 0.3, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(0, 0.3, generator=generator)
                if layer.owns:
                    order = torch.randperm(NEURONS, generator=generator)[: layer.top_k].sort().values
                    order = order if scattered else (torch.arange(layer.top_k) + NEURONS - 7) % NEURONS
                    layer.selection.selected.copy_(order)
    return model.eval()


def plain_block(block, x, act):
    """The block in float64, one selected neuron at a time."""
    bank, first = block["down"].bank, next(iter(block.values()))
    selected = range(bank.neurons) if first.selection is None else first.selection.selected.tolist()
    names = {name: layer for name, layer in block.items() if name != "down"}
    y = torch.zeros(*x.shape[:-1], bank.d_out, dtype=torch.float64)
    for place, neuron in enumerate(selected):
        values = {}
        for role in ("gate", "up") if bank.gated else ("up",):
            z = x @ bank.part(role)[:, neuron].double()
            fused = "gate_up" in names
            layer = names["gate_up"] if fused else names[role]
            if layer.scaled and not (fused and role == "up"):
                z = z * layer.weight[place].double()
            index = place + (len(selected) if fused and role == "up" else 0)
            if layer.bias is not None and index < len(layer.bias):
                z = z + layer.bias[index].double()
            values[role] = z
        h = act(values["gate"]) * values["up"] if bank.gated else act(values["up"])
        if block["down"].scaled:
            h = h * block["down"].weight[place].double()
        y += h[..., None] * bank.part("down")[neuron].double()
    return y if block["down"].bias is None else y + block["down"].bias.double()


FAMILIES = {
    "llama": ("layers.1.mlp", functional.silu),
    "arcee": ("layers.1.mlp", lambda x: torch.relu(x).square()),
    "phi3": ("layers.1.mlp", functional.silu),
    "gpt2": ("h.1.mlp", lambda x: functional.gelu(x, approximate="tanh")),
}


@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_block_is_the_sum_of_its_neurons(tiny, family, scattered):
    model = pilon(tiny, family, scattered=scattered).double()
    path, act = FAMILIES[family]
    x = torch.randn(3, 32, dtype=torch.float64)
    block = list(neuron_blocks(model))[1]
    found = model.base_model.get_submodule(path)(x)
    torch.testing.assert_close(found, plain_block(block, x, act), rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_bert_selects_neurons_with_the_biases_of_its_own(tiny):
    model = pilon(tiny, "bert", "base").double()
    layer, x = model.encoder.layer[1], torch.randn(1, 4, 32, dtype=torch.float64)
    block = list(neuron_blocks(model))[1]
    found = layer.output.dense(layer.intermediate(x))
    torch.testing.assert_close(found, plain_block(block, x, functional.gelu), rtol=1e-11, atol=1e-11)


def test_layers_that_use_all_neurons_without_scales_are_tied_plain_blocks(tiny):
    model, dense = (
        pilon(tiny, "llama", top_k=NEURONS, scaled=False),
        tiny.tiny_model("llama", intermediate_size=NEURONS),
    )
    assert not any("selected" in key for key in model.state_dict())
    with torch.no_grad():
        for index, block in enumerate(neuron_blocks(model)):
            for role, layer in block.items():
                dense.model.layers[index].mlp.get_submodule(f"{role}_proj").weight.copy_(layer.bank.part(role).T)
        dense.load_state_dict(
            {k: v for k, v in model.state_dict().items() if k in dense.state_dict()}
            | {k: v for k, v in dense.state_dict().items() if ".mlp." in k}
        )
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scattered", [True, False])
def test_a_bank_learns_from_all_layers_that_use_it(tiny, scattered):
    model = pilon(tiny, "llama", scattered=scattered)
    blocks = list(neuron_blocks(model))
    bank = blocks[0]["up"].bank
    assert bank is blocks[1]["up"].bank and bank is not blocks[2]["up"].bank
    x = torch.randn(5, 32)

    def gradient(*paths):
        model.zero_grad()
        sum(model.model.layers[path].mlp(x).square().sum() for path in paths).backward()
        return {role: matrix.weight.grad.clone() for role, matrix in bank.matrices()}

    both, first, second = gradient(0, 1), gradient(0), gradient(1)
    for role, whole in both.items():
        torch.testing.assert_close(whole, first[role] + second[role])
        rows = whole.T if role == "down" else whole
        used = {int(n) for block in blocks[:2] for n in block["gate"].selection.selected}
        assert {int(n) for n in rows.abs().sum(1).nonzero()[:, 0]} == used
    names = [name for name, _ in model.named_parameters() if name.startswith("model.pilon_banks")]
    assert len(names) == 6, "two banks of three matrices, once each"


@pytest.mark.parametrize(("family", "heads"), [("llama", "lm"), ("phi3", "lm"), ("gpt2", "lm"), ("bert", "base")])
@pytest.mark.parametrize("whole", [False, True])
def test_a_saved_model_loads_to_the_same_bits_and_size(tiny, tmp_path, family, heads, whole):
    model = pilon(tiny, family, heads, **({"top_k": NEURONS, "scaled": False} if whole else {}))
    save_model(model, tiny.tiny_tokenizer(), tmp_path / "m", torch.float32)
    auto = AutoModelForCausalLM if heads == "lm" else AutoModel
    loaded = auto.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], loaded(IDS)[0])
    assert layout_of(loaded) == layout_of(model)
    assert Layout.from_dict(json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["layout"])
    places = [f"{name}." for name, _ in neuron_projections(model)] + ["pilon_banks."]
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        ours = {key: file.get_tensor(key) for key in file.keys() if any(place in key for place in places)}  # noqa: SIM118
    size = ffn_size(layout_of(model), 4)
    assert size.stored == sum(tensor.numel() for tensor in ours.values())
    assert size.bytes == sum(tensor.numel() * tensor.element_size() for tensor in ours.values())
    k, d = (NEURONS if whole else TOP_K), 32
    assert size.macs == 3 * (2 if family in ("gpt2", "bert") else 3) * k * d


def test_a_folder_without_the_package_fails(tiny, tmp_path):
    """Every projection has a `weight` of a shape that no plain layer has."""
    for options in ({}, {"top_k": NEURONS, "scaled": False}):
        model = pilon(tiny, "llama", **options)
        for name, _ in neuron_projections(model):
            assert model.base_model.state_dict()[f"{name}.weight"].dim() == 1


@pytest.mark.parametrize("scattered", [True, False])
def test_ternary_training_evaluation_and_packed_bits_agree(tiny, scattered):
    model = pilon(tiny, "llama", scattered=scattered, quantization="ternary")
    with torch.no_grad():
        before = model(IDS).logits
        trained = model.train()(IDS).logits
        model.eval()
        assert torch.equal(before, trained)
        for encoding in ("base3", "2bit"):
            made = packed(copy.deepcopy(model), encoding)
            assert layout_of(made).kinds == {f"ternary-{encoding}"}
            assert torch.equal(made(IDS).logits, before)
    size, plain = ffn_size(layout_of(made), 4), ffn_size(layout_of(model), 4)
    assert size.bytes < plain.bytes / 6
    assert not foldable(model)
    with pytest.raises(ValueError, match="do not fold"):
        fold(model)


def test_held_digits_have_the_gradient_of_rounding(tiny):
    model = pilon(tiny, "llama", quantization="ternary").train()
    model(IDS).logits.square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if "pilon_banks" in name}
    model.zero_grad()
    for _, bank in neuron_banks(model):
        for _, matrix in bank.matrices():
            matrix.hold()
    model(IDS).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_integer_banks_save_load_and_fold(tiny, tmp_path, quantization):
    plain = pilon(tiny, "llama")
    model = tiny.tiny_model("llama")
    install(model, layout_for(model, quantization=quantization))
    model.load_state_dict({k: v for k, v in plain.state_dict().items() if "pilon_banks" not in k}, strict=False)
    grid = FORMATS[quantization].grid
    with torch.no_grad():
        for (_, bank), (_, source) in zip(neuron_banks(model), neuron_banks(plain), strict=True):
            values = {role: matrix.matrix() for role, matrix in source.matrices()}
            codes = {}
            for role, value in values.items():
                scale = grid.scales(value[None])
                ratio = value[None] / grid.spread(scale.float(), value.shape[0])
                codes[role] = {"codes": grid.nearest(ratio).to(grid.code_dtype), "scale": scale}
            bank.fill(values, codes)
        model.eval()
        error = (model(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm()
        assert error < (0.01 if quantization == "int8" else 0.2)
        save_model(model, tiny.tiny_tokenizer(), tmp_path / "m", torch.float32)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        folded = fold(loaded)
        torch.testing.assert_close(folded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "arcee", "phi3", "gpt2"])
def test_a_folded_block_is_a_plain_one_of_k_neurons(tiny, family):
    model = pilon(tiny, family)
    with torch.no_grad():
        before = model(IDS).logits
        folded = fold(copy.deepcopy(model))
        torch.testing.assert_close(folded(IDS).logits, before, rtol=1e-4, atol=1e-5)
    down = next(site for site in find_sites(folded) if site.role == "down")
    assert type(folded.base_model.get_submodule(down.name)) is torch.nn.Linear and down.d_in == TOP_K
    assert not hasattr(folded.base_model, "pilon_banks")


def test_a_block_is_built_from_tensors():
    """What a conversion does: bank tensors, a selection, scales and biases make a block."""
    torch.manual_seed(0)
    bank = NeuronBank(10, 6, 6, gated=True)
    bank.fill({"gate": torch.randn(6, 10), "up": torch.randn(6, 10), "down": torch.randn(10, 6)})
    block = neuron_block(bank, 4, {"gate": (6, 8), "up": (6, 8), "down": (8, 6)})
    scales = {"gate": torch.rand(4), "down": torch.rand(4)}
    fill_block(block, torch.tensor([1, 2, 7, 9]), scales, {"gate": torch.rand(4)})
    x = torch.randn(3, 6)
    found = block["down"](functional.silu(block["gate"](x)) * block["up"](x))
    torch.testing.assert_close(found.double(), plain_block(block, x.double(), functional.silu), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="scales or biases"):
        fill_block(block, torch.arange(4), {"gate": torch.ones(4)})
    with pytest.raises(ValueError, match="selection"):
        fill_block(block, None, scales, {"gate": torch.rand(4)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["neurons"]["layers.0.mlp.up_proj"].update(top_k=50), "selects 50 of the 48"),
        (lambda d: d["neurons"]["layers.0.mlp.up_proj"].update(bank="band7"), "band7"),
        (lambda d: d["neurons"]["layers.0.mlp.up_proj"].update(role="side"), "role 'side'"),
        (lambda d: d["neurons"]["layers.0.mlp.up_proj"].update(selection="layers.2.mlp.gate_proj"), "selection"),
        (lambda d: d["neurons"]["layers.0.mlp.up_proj"].update(scaled=True), "scale"),
        (lambda d: d["neuron_banks"]["band0"].update(gated=False), "no gates"),
        (lambda d: d["neuron_banks"]["band0"].update(neurons=True), "must be int"),
    ],
)
def test_a_damaged_layout_is_refused(tiny, change, message):
    model = tiny.tiny_model("llama")
    data = layout_for(model).to_dict()
    change(data)
    with pytest.raises(ValueError, match=message):
        Layout.from_dict(data)


def test_a_damaged_selection_is_refused(tiny, tmp_path):
    model = pilon(tiny, "llama")
    next(iter(neuron_blocks(model)))["gate"].selection.selected[3] = 99
    save_model(model, tiny.tiny_tokenizer(), tmp_path / "m", torch.float32)
    with pytest.raises(ValueError, match="not among the 48"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_inspection_shows_banks_and_their_blocks(tiny, tmp_path):
    model = pilon(tiny, "llama")
    save_model(model, tiny.tiny_tokenizer(), tmp_path / "m", torch.float32)
    found = anatomy(str(tmp_path / "m"))
    assert found.form == "pilon" and set(found.banks) == {"band0", "band1"}
    assert found.banks["band0"].n_primitives == NEURONS
    assert {(one.bank, one.neurons, one.top_k) for one in found.projections} == {
        ("band0", TOP_K, TOP_K),
        ("band1", TOP_K, TOP_K),
    }
    assert [part.layers for part in found.parts] == [[0, 1], [2]]
    assert sum(part.stored for part in found.parts) == found.ffn.stored


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_the_dense_form_has_blocks_of_k_neurons_or_is_refused(tiny, family):
    model = pilon(tiny, family, **({"scaled": False} if family == "phi3" else {}))
    with torch.no_grad():
        before = model(IDS).logits
        made = to_dense(copy.deepcopy(model))
        torch.testing.assert_close(made(IDS).logits, before, rtol=1e-4, atol=1e-5)
    assert (made.config.n_inner if family == "gpt2" else made.config.intermediate_size) == TOP_K
    if family == "phi3":
        with pytest.raises(BadInput, match="no place"):
            to_dense(pilon(tiny, "phi3"))


def test_healing_to_ternary_is_refused(tiny, tmp_path):
    save_model(pilon(tiny, "llama"), tiny.tiny_tokenizer(), tmp_path / "m", torch.float32)
    recipe = training.build({"task": "heal", "start": str(tmp_path / "m"), "ternary": {"enabled": True}})
    recipe = recipe.model_copy(update={"teacher": str(tmp_path / "dense")})
    tiny.save_tiny("llama", tmp_path / "dense")
    with pytest.raises(BadInput, match="banks of neurons"):
        check(recipe)
