"""Elastic files: stored in order of worth, cut to any smaller size without the dense model, by every road there is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import pilon_compress as pc
from pilon_compress.config import conversion
from pilon_compress.convert.pipeline import convert
from pilon_compress.elastic.factors import compensated, factorise
from pilon_compress.elastic.worth import FILE, read
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.size import ffn_size

TEXT = "\n\n".join(
    f"Paragraph {chr(97 + i % 26)}{chr(97 + i // 26)} tells of {'many ' * (i % 5)}things and of nothing else "
    "but the very things it names."
    for i in range(200)
)
IDS = torch.tensor(
    [[261 if not place else 5 + (7 * row + place * place) % 90 for place in range(40)] for row in range(8)]
)


def make(place, ratio):
    """Convert `place/dense`, elastic, to `place/out`."""
    (place / "text.txt").write_text(TEXT)
    calibration = {"data": str(place / "text.txt"), "samples": 16, "sequence_length": 32, "batch_size": 4}
    data = {"model": str(place / "dense"), "calibration": calibration, "evaluation": {"data": "none"}}
    data |= {"budget": {"ffn_ratio": ratio}, "form": {"elastic": True}}
    convert(conversion.build(data), place / "out")
    return place


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("llama")
    tiny.save_tiny("llama", place / "dense")
    return make(place, 1.0)


@pytest.fixture(scope="module")
def factored(tiny, tmp_path_factory):
    """An encoder with biases, whose conversion has factors: its weights are almost of rank 6."""
    place = tmp_path_factory.mktemp("bert")
    model = tiny.save_tiny("bert", place / "dense", heads="base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dense.weight") and max(weight.shape) == 64:
                U, S, Vh = torch.linalg.svd(weight)
                S[6:] *= 0.1
                weight.copy_((U[:, :32] * S) @ Vh[:32])
    model.save_pretrained(place / "dense")
    return make(place, 0.6)


def output(model):
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found.logits if "logits" in found else found.last_hidden_state


def numbers(model):
    return ffn_size(layout_of(model)).stored


def test_the_whole_file_computes_what_the_dense_model_does(llama):
    whole = AutoModelForCausalLM.from_pretrained(llama / "out")
    dense = AutoModelForCausalLM.from_pretrained(llama / "dense")
    assert (output(whole) - output(dense)).abs().max() < 1e-3 and numbers(whole) == ffn_size(
        layout_of(whole)
    ).dense_stored
    up = "layers.0.mlp.up_proj"
    ours, theirs = (model.base_model.get_submodule(up).weight for model in (whole, dense))
    assert not torch.allclose(ours, theirs, atol=1e-3)  # in another order


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.4])
def test_every_road_cuts_to_the_same_model(llama, cli, keep, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(llama / "out")
    cut = AutoModelForCausalLM.from_pretrained(llama / "out", keep=keep)
    assert keep - 0.01 <= numbers(cut) / numbers(full) <= keep
    loaded = pc.load(llama / "out", keep=keep)
    assert torch.equal(output(cut), output(loaded))
    pc.save(loaded, tmp_path / "kept")
    assert not {"README.md", "report.json", FILE} & {
        path.name for path in (tmp_path / "kept").iterdir()
    }  # of the larger
    assert torch.equal(output(cut), output(pc.load(tmp_path / "kept")))
    done = cli("export", "out", "--keep", keep, "-o", tmp_path / "cut", "--json", cwd=llama)
    assert json.loads(done.stdout)["ffn"]["stored"] == numbers(cut)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.equal(output(cut), output(saved)) and layout_of(saved) == layout_of(cut)
    cut.save_pretrained(tmp_path / "again")  # without this package's own road
    assert torch.equal(output(cut), output(AutoModelForCausalLM.from_pretrained(tmp_path / "again")))


def test_smaller_cuts_are_further_from_the_dense_model(llama):
    dense = output(AutoModelForCausalLM.from_pretrained(llama / "dense"))
    errors = [float((output(pc.load(llama / "out", keep=keep)) - dense).norm()) for keep in (0.9, 0.7, 0.5, 0.3)]
    assert errors == sorted(errors) and errors[0] > 0


def test_down_makes_up_for_neurons_that_go(llama, tiny):
    whole, cut = pc.load(llama / "out"), pc.load(llama / "out", keep=0.5)
    ids = tiny.tiny_tokenizer()(TEXT[:960], return_tensors="pt").input_ids.reshape(-1, 32)
    states = []
    name = "layers.0.mlp.down_proj"
    handle = whole.base_model.get_submodule(name).register_forward_hook(lambda module, x, y: states.append((x[0], y)))
    with torch.no_grad():
        whole(input_ids=ids)
        handle.remove()
        (x, y), down = states[0], cut.base_model.get_submodule(name)
        bare = whole.base_model.get_submodule(name).weight[:, : down.in_features]
        lost = [float((x[..., : down.in_features] @ weight.T - y).norm()) for weight in (down.weight, bare)]
    assert lost[0] < 0.95 * lost[1]


def test_factors_lose_components_and_biases_absorb(factored):
    whole = AutoModel.from_pretrained(factored / "out")
    layout = layout_of(whole)
    assert layout.banks, "the conversion should have made factors"
    cut = AutoModel.from_pretrained(factored / "out", keep=0.6)
    small = layout_of(cut)
    assert 0.59 <= numbers(cut) / numbers(whole) <= 0.6
    assert any(small.banks[name].rank < layout.banks[name].rank for name in layout.banks)
    dense = output(AutoModel.from_pretrained(factored / "dense"))
    lost = [float((output(model) - dense).norm() / dense.norm()) for model in (whole, cut)]
    assert lost[0] < lost[1] < 1


def test_a_cut_model_exports_heals_and_is_inspected_as_any_other(llama, cli, tmp_path):
    cli("export", "out", "--keep", "60%", "-o", tmp_path / "cut", cwd=llama)
    shown = json.loads(cli("inspect", tmp_path / "cut", "--json", cwd=llama).stdout)
    assert 0.59 < shown["ffn"]["stored_ratio"] <= 0.6
    cli("export", tmp_path / "cut", "--to", "dense", "-o", tmp_path / "dense", cwd=llama)
    direct = cli("export", "out", "--to", "dense", "--keep", "0.6", "-o", tmp_path / "direct", cwd=llama)
    assert "direct" in direct.stdout
    made = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "direct", "cut")]
    assert torch.equal(output(made[0]), output(made[1]))
    assert (output(made[0]) - output(made[2])).abs().max() < 1e-4
    tokens = pc.HealConfig(tokens=256, sequence_length=32, batch_size=2, validation_sequences=4)
    healed, result = pc.heal(tmp_path / "cut", config=tokens, data=TEXT.split("\n\n"))  # its recipe names the teacher
    assert result.val_perplexity <= result.before and numbers(healed) == numbers(made[2])
    refused = cli("export", tmp_path / "cut", "--keep", "0.5", "-o", tmp_path / "twice", cwd=llama, code=2)
    assert "is not stored in order of worth, so it cannot be cut: convert the dense model" in refused.stderr
    assert not (tmp_path / "twice").exists()


def test_text_refits_a_cut_better_than_the_file_alone(llama, cli, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(llama / "dense")
    alone = pc.load(llama / "out", keep=0.5)
    words = ("--keep", "0.5", "--calibration", "text.txt")
    done = cli("export", "out", *words, "-o", tmp_path / "cut", "--json", cwd=llama)
    assert json.loads(done.stdout)["ffn"]["stored"] == numbers(alone)
    refitted = pc.load(tmp_path / "cut")
    kl = [pc.evaluate(model, data=str(llama / "text.txt"), against=dense).kl for model in (alone, refitted)]
    assert kl[1] < 0.9 * kl[0]
    bare = cli("export", "out", "--to", "dense", "--calibration", "text.txt", "-o", tmp_path / "x", cwd=llama, code=2)
    assert "--calibration refits a cut: name its size with --keep" in bare.stderr


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, float("nan"), True, "half"])
def test_a_share_outside_its_range_is_refused(llama, keep):
    with pytest.raises(pc.BadInput, match="keep must be above 0 and at most 1"):
        pc.load(llama / "out", keep=keep)
    with pytest.raises(ValueError, match="keep must be above 0 and at most 1"):
        AutoModelForCausalLM.from_pretrained(llama / "out", keep=keep)


def test_what_cannot_be_cut_is_refused(llama, cli, tmp_path, tiny):
    with pytest.raises(pc.BadInput, match="not stored in order of worth.*--elastic"):
        pc.load(llama / "dense", keep=0.5)
    with pytest.raises(pc.BadInput, match="keep 0.0001 is too small: the smallest cut keeps 0.01"):
        pc.load(llama / "out", keep=0.0001)
    assert "--keep: " in cli("export", "out", "--keep", "2", "-o", tmp_path / "x", cwd=llama, code=2).stderr
    again = cli("export", "out", "--to", "pilon", "-o", tmp_path / "x", cwd=llama, code=2)
    assert "is in this form already: name a smaller size with --keep" in again.stderr
    with pytest.raises(pc.BadInput, match="form.elastic writes a file beside the weights"):
        pc.compress(tiny.tiny_model("llama"), tiny.tiny_tokenizer(), pc.ConvertConfig(elastic=True), calibration=[TEXT])


def test_a_file_of_another_model_or_none_is_refused(llama, tiny, tmp_path):
    lost = tiny.damaged(llama / "out", tmp_path / "lost", lambda tensors, config: None)
    blocks = load_file(lost / FILE)
    (lost / FILE).unlink()
    assert numbers(AutoModelForCausalLM.from_pretrained(lost)) > 0
    with pytest.raises(ValueError, match=f"keep=0.5 needs {FILE}, which is not beside the weights"):
        AutoModelForCausalLM.from_pretrained(lost, keep=0.5)
    save_file(blocks, lost / FILE)  # without its metadata
    with pytest.raises(pc.BadInput, match="does not say how to cut the model"):
        pc.load(lost, keep=0.5)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"form": {"elastic": True, "bank_dtype": "int8"}}, "integers are fitted to one size"),
        ({"form": {"elastic": True}, "budget": {"share": "auto", "ffn_ratio": 0.5}}, "a shared bank has no order"),
        ({"form": {"elastic": True}, "budget": {"neurons": False}}, "needs neurons that may go"),
        ({"form": {"elastic": True}, "method": "svd"}, "has no effect with method svd"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(recipe, message):
    with pytest.raises(pc.BadInput, match=f"form.elastic: .*{message}"):
        conversion.build({"model": "x", **recipe})


def test_a_dry_run_and_a_resumed_conversion_know_the_order(llama):
    blocks = read(llama / "out" / FILE)
    assert [block.down for block in blocks] == [f"layers.{layer}.mlp.down_proj" for layer in range(3)]
    for block in blocks:
        assert (block.loss.diff() <= 0).all() and float(block.loss[-1]) == 0 and len(block.loss) == 65


def test_a_moment_of_few_factors_is_found_and_refits_exactly():
    torch.manual_seed(0)
    true = torch.randn(40, 5, dtype=torch.float64)
    moment = true @ true.T + torch.diag(torch.rand(40, dtype=torch.float64) + 0.5)
    variance, factors = factorise(moment, 5)
    made = torch.diag(variance) + factors @ factors.T
    assert float((made - moment).norm() / moment.norm()) < 0.05
    rows = torch.randn(40, 7, dtype=torch.float64)
    exact = torch.linalg.solve(made[:25, :25], made[:25] @ rows)
    torch.testing.assert_close(compensated(rows, 25, variance, factors), exact)
