"""The rest of a model in integers: attention, head and token embeddings, by whatever head it is loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import pilon_compress  # noqa: F401  registers the format
from pilon_compress.config import training
from pilon_compress.config.budget import Budget
from pilon_compress.config.export import ExportOptions
from pilon_compress.convert.allocate.uniform import make_plan
from pilon_compress.errors import BadInput
from pilon_compress.export.run import export
from pilon_compress.export.save import save_model
from pilon_compress.kernels import cpu, reference
from pilon_compress.models.checkpoint import load_model
from pilon_compress.models.families import find_sites
from pilon_compress.nn.formats.registry import grid_of
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.int8 import Int8Embedding, Int8Head, Int8Linear
from pilon_compress.nn.rest import find, round_rest
from pilon_compress.nn.rows import RowEmbedding, RowHead, RowLinear
from pilon_compress.nn.size import model_size
from pilon_compress.train.preflight import check

IDS = torch.arange(5, 25).reshape(2, 10)
CASES = [
    ("gpt2", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("bert", {}),
]


def ternary(tiny, family, **config):
    model = tiny.tiny_model(family, **config)
    sites = find_sites(model)
    downs = [site.name for site in sites if site.role == "down"]
    layout = make_plan(sites, Budget(ffn_ratio=0.6), "pilon", "component").layout().ternary(downs, 16)
    return initialise(install(model, layout), 0.1, torch.Generator().manual_seed(0)).eval()


def save(tiny, model, folder):
    folder.mkdir()
    save_model(model, tiny.tiny_tokenizer(), folder, torch.float32)
    return str(folder)


def output(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids)[0]


def auto(family):
    return AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM


@pytest.mark.parametrize("number", ["int8", "int4"])
@pytest.mark.parametrize(("family", "config"), CASES)
def test_everything_else_in_integers_survives_saving(tiny, tmp_path, family, config, number):
    model = ternary(tiny, family, **config)
    exact = output(model)
    suffix = "" if number == "int8" else "-int4"
    expected = {kind + suffix for kind in find(model).values()}
    round_rest(model, number)
    kinds = {type(module) for module in model.modules()}
    linear, words, head = (
        (Int8Linear, Int8Embedding, Int8Head) if number == "int8" else (RowLinear, RowEmbedding, RowHead)
    )
    assert {linear, words} <= kinds and expected == set(layout_of(model).rest.values())
    assert (head in kinds) == (f"head{suffix}" in expected) == (config.get("tie_word_embeddings", True) is True)
    before = output(model)
    assert 0 < (before - exact).norm() < (0.05 if number == "int8" else 0.4) * exact.norm()
    folder = save(tiny, model, tmp_path / "m")
    loaded = auto(family).from_pretrained(folder)
    assert layout_of(loaded) == layout_of(model) and torch.equal(output(loaded), before)
    if f"head{suffix}" in expected:
        assert loaded.get_output_embeddings().weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    on_disk = sum(t.nbytes for t in load_file(f"{folder}/model.safetensors").values())
    assert model_size(layout_of(model), tiny.tiny_model(family, **config), 4).bytes == on_disk
    again = save(tiny, loaded, tmp_path / "again")
    assert torch.equal(output(auto(family).from_pretrained(again)), before)
    half = auto(family).from_pretrained(folder, dtype=torch.bfloat16)
    assert (output(half).float() - before).norm() < 0.1 * before.norm()


@torch.no_grad()
@pytest.mark.parametrize("width", [48, 130])
def test_rows_of_four_bits_are_their_definition(width):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(33, width, generator=generator), torch.randn(3, width, generator=generator)
    grid = grid_of("int4")
    words = RowEmbedding(33, width, None, torch.float32, grid)
    words.put(weight)
    whole = words(torch.arange(33))
    step = words.scale.float().abs().repeat_interleave(64, 1)[:, :width]
    assert ((whole - weight).abs() <= 0.51 * step)[weight.abs() < 6 * step].all()
    assert torch.equal(words(torch.tensor([[3, 7]])), whole[[3, 7]][None])
    linear = RowLinear(width, 33, True, grid)
    linear.put(weight)
    linear.bias.normal_(generator=generator)
    expected = (x.double() @ whole.double().T + linear.bias).float()
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(RowHead(words, False)(x), expected - linear.bias)
    learning = x.clone().requires_grad_()
    with torch.enable_grad():
        linear(learning).sum().backward()
    torch.testing.assert_close(learning.grad, whole.sum(0).expand(3, -1))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_other_heads_read_the_same_file(tiny, tmp_path, family):
    model = ternary(tiny, family)
    round_rest(model, "int8")
    folder = save(tiny, model, tmp_path / "m")
    assert torch.equal(output(AutoModel.from_pretrained(folder)), output(model.base_model))
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0).eval()
    assert torch.equal(output(judge.base_model), output(model.base_model)) and output(judge).shape == (2, 3)


@torch.no_grad()
def test_linear_and_embedding_are_their_definition():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(40, 1100, generator=generator), 5 * torch.randn(3, 1100, generator=generator)
    linear = Int8Linear(1100, 40, True)
    rows, linear.scale = reference.int8_rows(weight)
    linear.weight.copy_(rows)
    linear.bias.normal_(generator=generator)
    codes = (x * (127 / x.abs().amax(1, keepdim=True))).round().long()
    whole = codes @ rows.long().T  # beyond 2^24: exact only in whole numbers
    expected = whole.float() * (x.abs().amax(1, keepdim=True) / 127) * linear.scale + linear.bias
    assert torch.equal(linear(x), expected)
    words = Int8Embedding(40, 1100, None, torch.float32)
    words.weight.copy_(rows)
    words.scale = linear.scale
    assert torch.equal(words(torch.tensor([[3, 7]])), (rows[[3, 7]].float() * linear.scale[[3, 7], None])[None])


@torch.no_grad()
def test_inputs_need_not_be_contiguous(tiny):
    """Check inputs like those of a pooler, which reads the first token of each text."""
    x, generator = torch.randn(4, 3, 48), torch.Generator().manual_seed(0)
    linear = Int8Linear(48, 40, False)
    rows, linear.scale = reference.int8_rows(torch.randn(40, 48, generator=generator))
    linear.weight.copy_(rows)
    digits = torch.randint(-1, 2, (48, 40), generator=generator).to(torch.int8)
    matrix, scale = cpu.matrix_tiles(digits), torch.rand(40, generator=generator)
    for compute in (linear, lambda one: cpu.project(one, cpu.CpuProjection(matrix, scale))):
        assert torch.equal(compute(x[:, 0]), compute(x[:, 0].contiguous()))
    encoder = ternary(tiny, "bert").base_model
    pooled = type(encoder)(encoder.config).eval()
    round_rest(pooled, "int8")
    assert pooled(input_ids=IDS).pooler_output.isfinite().all()


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    save(tiny, ternary(tiny, "gpt2"), folder / "ternary")
    export(str(folder / "ternary"), folder / "packed", "packed", ExportOptions(rest="int8"))
    return folder


@pytest.mark.parametrize(("number", "error"), [("int8", 0.05), ("int4", 0.4)])
def test_the_command(cli, source, tmp_path, number, error):
    done = cli("export", source / "ternary", "--to", "packed", "--rest", number, "-o", tmp_path / "out", "--json")
    told = json.loads(done.stdout)
    assert told["max_logit_difference"] == 0 and 0 < told["rest_relative_error"] < error
    assert told["model"]["bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert number in (tmp_path / "out" / "README.md").read_text()
    cli("generate", tmp_path / "out", "--prompt", "a", "--max-new-tokens", "3")


def test_what_is_packed_may_still_lose_its_rest_once(tiny, source, tmp_path):
    export(str(source / "ternary"), tmp_path / "plain", "packed")
    found = export(str(tmp_path / "plain"), tmp_path / "rest", "packed", ExportOptions(rest="int8")).dump()
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "rest", source / "packed"))
    assert found["max_logit_difference"] == 0 and torch.equal(output(ours), output(theirs))
    for again in ("none", "int8", "int4"):
        with pytest.raises(BadInput, match="packed already"):
            export(str(source / "packed"), tmp_path / "never", "packed", ExportOptions(rest=again))
    for target in ("dense", "self-contained"):
        with pytest.raises(BadInput, match="integers throughout|is packed"):
            export(str(source / "packed"), tmp_path / "never", target)
    assert not (tmp_path / "never").exists()


def zero(tensors, config):
    next(t for name, t in tensors.items() if name.endswith("c_attn.scale"))[3] = 0


def lost(tensors, config):
    del tensors["transformer.wte.scale"]


def elsewhere(tensors, config):
    config["quantization_config"]["layout"]["rest"]["h.9.attn.c_attn"] = "linear"


def unknown(tensors, config):
    config["quantization_config"]["layout"]["rest"]["wte"] = "int3"


@pytest.mark.parametrize("damage", [zero, lost, elsewhere, unknown])
def test_damage_is_one_line_and_nothing_loads(tiny, source, tmp_path, damage):
    with pytest.raises(BadInput) as refusal:
        load_model(str(tiny.damaged(source / "packed", tmp_path / "m", damage)))
    assert len(str(refusal.value).splitlines()) == 1, refusal.value


def test_packed_models_are_not_trained(source):
    with pytest.raises(BadInput, match="is packed, which does not train"):
        check(training.build({"task": "sft", "start": str(source / "packed"), "data": {"source": "chats.jsonl"}}))
