"""From float factors to digits: balancing changes nothing, refitting helps, healing brings back what rounding lost."""

import copy
import json
import pydoc_data.topics

import pytest
import torch
from safetensors.torch import load_file

from pilon_compress.config import conversion
from pilon_compress.config import training as recipes
from pilon_compress.convert.pipeline import convert
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.evaluate import evaluate
from pilon_compress.models import checkpoint
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.fold import dense
from pilon_compress.nn.formats.ternary import TernaryBank, TernaryLinear
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import banks, dense_matrices, layout_of, projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.specs import BankSpec, DenseSpec, ProjectionSpec
from pilon_compress.train.pipeline import train_model
from pilon_compress.train.ternary.blocks import BlockFit, fit_blocks
from pilon_compress.train.ternary.initialise import equalise_components, refit_composition, refit_scale, ternarise

LENGTH = 64
COMPOSITIONS = ("component", "scalar", "softmax")
LATENT = ("latent_bias", "latent_scale")


def small(tiny, composition="component", bias=False, latent=()):
    """A tiny Llama whose layers share banks, but for the first up projection, all of random floats."""
    torch.manual_seed(0)
    model = tiny.tiny_model("llama")
    config = model.config
    d, h = config.hidden_size, config.intermediate_size
    bank = {"n_primitives": 3, "rank": 4}
    made = {"band0.up": BankSpec(d, h, **bank), "band0.down": BankSpec(h, d, **bank)}
    places = [f"layers.{i}.mlp.{role}_proj" for i in range(config.num_hidden_layers) for role in ("up", "down")]
    use = {
        name: ProjectionSpec("band0.up" if "up" in name else "band0.down", 2, bias, composition) for name in places[1:]
    }
    layout = Layout(made, use, {places[0]: DenseSpec(d, h, bias)})
    for kind in latent:
        layout = layout.with_addition("original", kind, made)
    install(model, layout)
    for name, parameter in model.named_parameters():
        if "mlp" in name or "pilon" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for _, one in banks(model):  # components of very different sizes, as conversions leave them
        one.A.data *= torch.logspace(-2, 0, 4)
        one.B.data *= torch.logspace(0, -1, 3)[:, None, None]
    return model.eval()


def text(model):
    return {"input_ids": torch.randint(3, model.config.vocab_size, (8, 32)), "use_cache": False}


@pytest.mark.parametrize("latent", [(), LATENT])
@pytest.mark.parametrize("composition", COMPOSITIONS)
@torch.no_grad()
def test_balancing_changes_no_output_and_evens_sizes_out(tiny, composition, latent):
    model = small(tiny, composition, latent=latent)
    inputs = text(model)
    before = model(**inputs).logits
    for _, bank in banks(model):
        equalise_components(bank, [layer for _, layer in projections(model) if layer.bank is bank])
        if composition == "component":
            sizes = bank.B.square().mean(2)
            assert torch.allclose(sizes, sizes.mean().expand_as(sizes), rtol=1e-3)
    assert torch.allclose(model(**inputs).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("composition", "latent"), [*((one, ()) for one in COMPOSITIONS), ("component", LATENT)])
@torch.no_grad()
def test_refitted_digits_compute_more_nearly_what_floats_did(tiny, composition, latent):
    model = small(tiny, composition, bias=True, latent=latent)
    inputs, plain = text(model), copy.deepcopy(model)
    wanted = plain(**inputs).logits
    apart = []
    for given in (None, inputs):
        rounded = copy.deepcopy(plain)
        ternarise(rounded, ["layers.0.mlp.down_proj"], given, group=16)
        apart.append(float((rounded(**inputs).logits - wanted).norm() / wanted.norm()))
    assert apart[1] < apart[0]
    layout = layout_of(rounded)
    assert layout == layout_of(plain).ternary(["layers.0.mlp.down_proj"], 16)
    assert {layout.projections[name].group for name in layout.projections} == {0, 16}
    owners = {id(bank) for _, bank in banks(rounded)}
    assert all(id(layer.bank) in owners and isinstance(layer.bank, TernaryBank) for _, layer in projections(rounded))
    for (_, ours), (_, theirs) in zip(projections(rounded), projections(plain), strict=True):
        assert composition == "softmax" or torch.equal(ours.selected, theirs.selected)


@torch.no_grad()
def test_padding_has_no_part_in_the_refit(tiny):
    model = small(tiny)
    inputs = text(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, 20:] = 0
    other = inputs["input_ids"].clone()
    other[:, 20:] = 5
    found = []
    for ids in (inputs["input_ids"], other):
        rounded = copy.deepcopy(model)
        ternarise(rounded, [], {"input_ids": ids, "attention_mask": mask, "use_cache": False})
        found.append(rounded.state_dict())
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-4, atol=1e-6) for name in found[0])


@torch.no_grad()
def test_least_squares_cannot_be_bettered_by_hand():
    torch.manual_seed(0)
    layer = ComposedLinear(TernaryBank(24, 20, 3, 4), 2, bias=True)
    for parameter in [*layer.bank.parameters(), *layer.parameters()]:
        torch.nn.init.normal_(parameter)
    layer.eval(), layer.bank.eval()
    x = torch.randn(400, 24)
    wanted = x @ dense(layer)[0] * 1.7 + 3 + torch.randn(400, 20)
    refit_composition(layer, x, wanted)
    best = float((layer(x) - wanted).square().sum())
    for _ in range(30):
        other = copy.deepcopy(layer)
        object.__setattr__(other, "bank", layer.bank)
        other.weight.add_(0.05 * torch.randn_like(other.weight))
        other.bias.add_(0.05 * torch.randn_like(other.bias))
        assert float((other(x) - wanted).square().sum()) > best * 0.999
    kept = TernaryLinear(24, 20, True, (24, 20)).eval()
    wanted = x @ kept.weight.T * 1.7 + 3
    refit_scale(kept, x, wanted)
    best = float((kept(x) - wanted).square().sum())
    for _ in range(30):
        other = copy.deepcopy(kept)
        other.weight.mul_(1 + 0.1 * torch.randn(()))
        other.bias.add_(0.1 * torch.randn_like(other.bias))
        assert float((other(x) - wanted).square().sum()) > best * 0.999


# --- healing


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text, a small dense LM that was trained on it, and its conversion to two fifths."""
    folder = tmp_path_factory.mktemp("heal")
    topics = [topic for _, topic in sorted(pydoc_data.topics.topics.items())][:30]
    lines = [json.dumps({"text": part}) for topic in topics for part in topic.split("\n\n") if len(part) > 60]
    (folder / "text.jsonl").write_text("\n".join(lines))
    host = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    host |= {"intermediate_size": 96, "vocab_size": 300, "tokenizer": "bpe"}
    data = {"source": str(folder / "text.jsonl"), "sequence_length": LENGTH, "validation_sequences": 12}
    asked = {"task": "pretrain", "host": host, "data": data, "ffn": {"kind": "dense"}}
    asked |= {"schedule": {"tokens": 512 * 150}, "optimizer": {"learning_rate": 5e-3}}
    asked |= {"run": {"batch_size": 8, "evaluate_every": 1000}}
    calibration = {"data": str(folder / "text.jsonl"), "samples": 24, "sequence_length": LENGTH, "batch_size": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PILON_CACHE", str(folder / "cache"))
        train_model(recipes.build(asked), folder / "dense", quiet=True)
        asked = {"model": str(folder / "dense"), "budget": {"ffn_ratio": 0.4}, "calibration": calibration}
        convert(conversion.build({**asked, "effort": "fast", "evaluation": {"data": "none"}}), folder / "pilon")
        yield folder


def healing(folder, steps=16, **changes):
    data = {"source": str(folder / "text.jsonl"), "sequence_length": LENGTH, "validation_sequences": 12}
    asked = {"task": "heal", "start": str(folder / "pilon"), "data": data, "ternary": {"enabled": True, "after": 0.5}}
    asked |= {"schedule": {"tokens": steps * 8 * LENGTH}, "run": {"batch_size": 8}}
    return recipes.build(asked, [f"{name}={json.dumps(value)}" for name, value in changes.items()])


def test_healing_digits_beats_rounding_and_says_what_each_stage_brought(home, tmp_path):
    result = train_model(healing(home), tmp_path / "out", quiet=True).dump()
    floats, digits = result["stages"]
    assert floats["tokens"] == digits["tokens"] == 8 * 8 * LENGTH and result["tokens"] == 2 * floats["tokens"]
    assert floats["val_perplexity"] < floats["before"], "factors healed first"
    assert digits["before"] > floats["val_perplexity"], "rounding costs"
    assert result["val_perplexity"] == digits["val_perplexity"] < digits["before"], "training brings back"
    assert recipes.load(str(tmp_path / "out/recipe.yaml")).start == str(home / "pilon")
    model = checkpoint.load_model(str(tmp_path / "out"))
    assert all(isinstance(bank, TernaryBank) for _, bank in banks(model)) and layout_of(model).is_ternary
    assert all(isinstance(matrix, TernaryLinear) for _, matrix in dense_matrices(model))
    assert evaluate(str(tmp_path / "out"), data=str(home / "text.jsonl")).dump()["against"] == str(home / "dense")
    with pytest.raises(BadInput, match="is ternary already"):
        train_model(healing(home, start=str(tmp_path / "out")), tmp_path / "again", quiet=True)
    with pytest.raises(BadInput, match="is dense: convert it"):
        train_model(healing(home, start=str(home / "dense"), teacher=str(home / "dense")), tmp_path / "x", quiet=True)
    assert not (tmp_path / "again").exists() and not (tmp_path / "x").exists()


def test_stopped_in_either_stage_and_resumed_ends_with_the_same_weights(home, tmp_path, stop_after):
    asked = healing(home, 8, device="cpu")  # four steps as floats, four in digits
    whole = train_model(asked, tmp_path / "whole", quiet=True).dump()
    for steps, place in ((2, "stages/float"), (2 + 2, ".")):
        with stop_after(steps):
            train_model(asked, tmp_path / "parts", resume=True, quiet=True)
        assert [path.name for path in (tmp_path / "parts" / place).glob("checkpoints/step-*")] == ["step-00000002"]
        assert not (tmp_path / "parts/config.json").exists()
    parts = train_model(asked, tmp_path / "parts", resume=True, quiet=True).dump()
    assert [stage["before"] for stage in parts["stages"]] == [stage["before"] for stage in whole["stages"]]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_digits_from_the_start(home, tmp_path):
    changes = {"ternary.after": 0.0, "research.bitnet.warmup": 0.25}
    result = train_model(healing(home, 8, **changes), tmp_path / "out", quiet=True).dump()
    assert "stages" not in result and not (tmp_path / "out/stages").exists()
    assert result["val_perplexity"] < result["before"]
    again = recipes.build({"task": "heal", "start": str(tmp_path / "out"), "run": {"batch_size": 8}})
    data = healing(home).data.model_copy()
    again = again.model_copy(update={"data": data, "schedule": healing(home, 4).schedule})
    more = train_model(again, tmp_path / "more", quiet=True).dump()
    assert more["before"] == pytest.approx(result["val_perplexity"], rel=1e-4), "a ternary model goes on as one"


# --- block by block, and scales alone


def codes(model):
    found = {name: one.codes() for name, one in (*banks(model), *dense_matrices(model))}
    return {name: value.clone() for name, value in found.items()}


def test_stages_fit_blocks_then_the_model_then_scales_alone(home, tmp_path):
    changes = {"ternary.after": 0.0, "ternary.blocks": 0.25, "ternary.scales": 0.25}
    result = train_model(healing(home, 16, **changes), tmp_path / "out", quiet=True).dump()
    fitted, whole, scales = result["stages"]
    assert [stage["tokens"] for stage in result["stages"]] == [4 * 8 * LENGTH, 8 * 8 * LENGTH, 4 * 8 * LENGTH]
    assert fitted["val_perplexity"] < fitted["before"], "better than rounded and refitted"
    assert (
        whole["before"] == pytest.approx(fitted["val_perplexity"], rel=1e-4)
        and whole["val_perplexity"] < whole["before"]
    )
    assert scales["before"] == pytest.approx(whole["val_perplexity"], rel=1e-4)
    assert result["val_perplexity"] == scales["val_perplexity"] <= scales["before"]
    stages = [
        codes(checkpoint.load_model(str(tmp_path / "out" / one))) for one in ("stages/blocks", "stages/ternary", ".")
    ]
    assert any(not torch.equal(stages[0][name], stages[1][name]) for name in stages[0])
    assert all(torch.equal(stages[1][name], stages[2][name]) for name in stages[1]), "ternary weights stay"
    weights = [load_file(tmp_path / "out" / one / "model.safetensors") for one in ("stages/ternary", ".")]
    moved = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    composed = {f"model.{name}.weight" for name, _ in projections(checkpoint.load_model(str(tmp_path / "out")))}
    assert moved <= composed and (moved or scales["val_perplexity"] == pytest.approx(scales["before"], rel=1e-4))


def test_blocks_alone_stopped_within_and_resumed_end_with_the_same_weights(home, tmp_path, monkeypatch):
    asked = healing(home, 4, **{"ternary.after": 0.0, "ternary.blocks": 1.0}, device="cpu")
    whole = train_model(asked, tmp_path / "whole", quiet=True).dump()
    assert whole["val_perplexity"] < whole["before"] and whole["tokens"] == 4 * 8 * LENGTH and "stages" not in whole
    plain, seen = BlockFit.step, []

    def step(fit, optimizers, index, share):
        seen.append(fit)
        if len({id(one) for one in seen}) == 2 and share > 0.3:
            raise KeyboardInterrupt
        plain(fit, optimizers, index, share)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BlockFit, "step", step)
        train_model(asked, tmp_path / "parts", quiet=True)
    files = list((tmp_path / "parts").rglob("block-*.safetensors"))
    assert [path.name for path in files] == ["block-000.safetensors"] and not (tmp_path / "parts/config.json").exists()
    train_model(asked, tmp_path / "parts", resume=True, quiet=True)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((tmp_path / "parts").rglob("block-*.safetensors"))


@torch.no_grad()
def test_a_bank_that_blocks_share_keeps_its_ternary_weights(tiny, tmp_path):
    model, teacher = small(tiny), small(tiny)
    inputs = text(model)
    ternarise(model, [], inputs)
    before, compositions = codes(model), {name: layer.weight.clone() for name, layer in projections(model)}
    batches = [Batch(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in inputs["input_ids"].split(2)]
    with torch.enable_grad():
        fit_blocks(model, teacher, batches, recipes.build({"task": "heal", "start": "x"}), tmp_path, quiet=True)
    after = codes(model)
    assert all(torch.equal(before[name], after[name]) for name in before if "band" in name)
    assert any(not torch.equal(compositions[name], layer.weight) for name, layer in projections(model))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"task": "pretrain", "ternary": {"enabled": True, "blocks": 0.5}},
            "ternary.blocks: has no effect with task",
        ),
        (
            {"task": "heal", "start": "x", "ternary": {"scales": 0.5}},
            "ternary.scales: has no effect with ternary",
        ),
        ({"task": "heal", "start": "x", "ternary": {"enabled": True, "blocks": 0.8}}, "more than all of the tokens"),
        (
            {"task": "heal", "start": "x", "ternary": {"enabled": True, "blocks": 0.5}, "data": {"streaming": True}},
            "ternary.blocks: needs text that is stored",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(data, message):
    with pytest.raises(BadInput, match=message):
        recipes.build(data)
