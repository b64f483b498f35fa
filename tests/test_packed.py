"""Packed ternary models: exact codecs, the same outputs bit for bit, the bytes that are reported, refusals."""

import copy
import json
import shutil
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pilon_compress  # noqa: F401  registers the format
from pilon_compress.config import training
from pilon_compress.config.export import ExportOptions
from pilon_compress.errors import BadInput
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.export.run import export
from pilon_compress.kernels import cpu, dispatch, reference
from pilon_compress.kernels.gpu_layout import BankWords, MatrixWords
from pilon_compress.nn.formats.packed_ternary import PackedBank, PackedLinear
from pilon_compress.nn.ternary_codec import PER_BYTE, pack, unpack, valid
from pilon_compress.train.pipeline import train_model

KINDS = {
    "arcee": ["ffn.rank=20"],
    "llama": ["ffn.rank=3", "host.family=llama", "research.bitnet.sub_norm=true"],
    "options": [
        "ffn.rank=8",
        *(f"research.original.latent_{one}=true" for one in ("scale", "bias")),
        "ffn.composition=scalar",
    ],
    "dense": ["ffn.kind=dense", "host.num_hidden_layers=2"],
    # the others have ranks that the kernels pad
    "rank16": ["ffn.rank=16", "research.original.latent_bias=true", "host.num_hidden_layers=2"],
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ternary") / request.param
    asked = ["ternary.enabled=true", "schedule.tokens=4096", "run.evaluate_every=100", *KINDS[request.param]]
    train_model(training.load("smoke", asked), folder, quiet=True)
    return folder


def logits(folder, ids, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


needs_kernel = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler here")
IDS = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(1))


@given(st.integers(1, 3), st.integers(1, 23), st.integers(1, 9), st.sampled_from(list(PER_BYTE)), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_codecs_are_exact_and_as_small_as_they_say(n, d, m, encoding, seed):
    digits = torch.randint(-1, 2, (n, d, m), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    codes = pack(digits, encoding)
    assert codes.dtype == torch.uint8 and codes.shape == (n, -(-d * m // PER_BYTE[encoding]))
    assert torch.equal(unpack(codes, (d, m), encoding), digits) and valid(codes, encoding)


def test_bytes_that_are_no_digits_are_told():
    assert not valid(torch.tensor([0b11000000], dtype=torch.uint8), "2bit")
    assert valid(torch.tensor([0b10101010], dtype=torch.uint8), "2bit")
    assert valid(torch.tensor([242], dtype=torch.uint8), "base3")
    assert not valid(torch.tensor([243], dtype=torch.uint8), "base3")


@needs_kernel
def test_every_rank_runs_on_the_kernel(cli, trained, tmp_path, monkeypatch, said):
    export(str(trained), tmp_path / "packed", "packed")
    expected = logits(trained, IDS)
    for name in ("compose", "ternary_linear"):
        monkeypatch.setattr(reference, name, refuse_to_compute)
    assert torch.equal(logits(tmp_path / "packed", IDS), expected)
    assert said() == []
    told = json.loads(cli("inspect", tmp_path / "packed", "--json").stdout)
    for one in told["projections"]:
        assert one["kernel"].startswith(f"ternary {cpu.isas()[0]}"), one
        odd = (one["top_k"] or 1) * (one["rank"] or 16) % 16 != 0
        assert ("computed as" in one["kernel"]) == odd, one
    ranks = {name: bank["rank"] for name, bank in told["banks"].items()}
    assert any(rank % 16 for rank in ranks.values()) == (trained.name in ("arcee", "llama", "options"))
    padded = sum(-(-one["top_k"] * one["rank"] // 16) * 16 * (64 + 256) for one in told["projections"] if one["rank"])
    assert trained.name == "dense" or told["ffn"]["macs"] == padded, "padding is computed, and so it counts"


def refuse_to_compute(*arguments, **options):
    raise AssertionError("another kernel ran")


@pytest.mark.parametrize("trained", ["rank16"], indirect=True)
def test_a_layer_that_no_kernel_takes_says_why_once(trained, tmp_path, monkeypatch, said):
    """Groups of 100 inputs fill no tiles."""
    export(str(trained), tmp_path / "packed", "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    for name, spec in config["quantization_config"]["layout"]["projections"].items():
        spec["group"] = 100 if "down" in name else 0
    path.write_text(json.dumps(config))
    (tmp_path / "packed" / "manifest.json").unlink()
    monkeypatch.setattr(dispatch, "_said", set())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=IDS)
    (line,) = said()
    assert line.startswith("model.pilon_banks.band0.down runs in plain torch, slower, and so do others like it: ")
    assert "no scales for 100 inputs" in line
    kernels = {one.role: one.kernel for one in anatomy(str(tmp_path / "packed")).projections}
    assert kernels["down"].startswith("torch, slow: ") and "100 inputs" in kernels["down"]


@pytest.mark.parametrize("encoding", PER_BYTE)
def test_packed_outputs_are_bit_equal_and_bytes_are_those_on_disk(trained, tmp_path, encoding):
    found = export(str(trained), tmp_path / "packed", "packed", ExportOptions(encoding=encoding)).dump()
    assert found["max_logit_difference"] == 0
    assert torch.equal(logits(tmp_path / "packed", IDS), logits(trained, IDS))
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".mlp." in name or "pilon_banks" in name]  # noqa: SIM118
        assert found["ffn"]["bytes"] == sum(file.get_tensor(name).nbytes for name in names)
    assert AutoTokenizer.from_pretrained(tmp_path / "packed").eos_token == "<eos>"
    # in bfloat16 the scales stay whole: what is computed from the same inputs is the same
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    halves = [n for n, p in model.named_parameters() if "mlp" in n and n.endswith("_proj.weight")]
    assert halves and all(model.get_parameter(name).dtype == torch.float32 for name in halves)
    whole = AutoModelForCausalLM.from_pretrained(trained).bfloat16()
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits.float(), whole(input_ids=IDS).logits.float()
    assert (ours - theirs).norm() < 0.08 * theirs.norm()  # processors with bfloat16 products round them otherwise


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("trained", ["rank16", "arcee", "dense"], indirect=True)
def test_where_triton_runs_a_model_computes_the_same_by_its_kernels(trained, tmp_path, monkeypatch):
    export(str(trained), tmp_path / "packed", "packed")
    asked = [(IDS[:1, :1], torch.bfloat16), (IDS[:1, :17], torch.float32)]  # from 17 tokens on other kernels run
    before = [logits(tmp_path / "packed", ids, dtype=dtype) for ids, dtype in asked]
    for where, name in ((reference, "compose"), (reference, "ternary_linear"), (cpu, "prepared")):
        monkeypatch.setattr(where, name, refuse_to_compute)
    monkeypatch.setattr(dispatch, "TRITON", {"cpu"})  # as if this were a GPU: in the interpreter (conftest.py)
    for (ids, dtype), expected in zip(asked, before, strict=True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=dtype).eval()
        with torch.no_grad():
            y = model(input_ids=ids).logits
        assert y.dtype == dtype and torch.equal(y, expected)
        banks = [one for m in model.modules() if isinstance(m, PackedBank) for one in m._unpacked.values()]
        made = {type(one.value.digits) for one in banks}
        made |= {type(m._unpacked.value) for m in model.modules() if isinstance(m, PackedLinear)}
        assert made == {"rank16": {BankWords}, "arcee": set(), "dense": {MatrixWords}}[trained.name]


@pytest.mark.parametrize("trained", ["rank16", "dense"], indirect=True)
@pytest.mark.parametrize("ran", [False, True], ids=["at once", "after it ran"])
def test_compilers_see_a_layer_whole(trained, tmp_path, ran):
    export(str(trained), tmp_path / "packed", "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, layer.host_shape[0])
    with torch.no_grad():
        if ran:
            layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
        exported = torch.export.load(tmp_path / "layer.pt2").module()(x)
        assert torch.equal(compiled, layer(x)) and torch.equal(exported, layer(x))


@pytest.mark.parametrize("trained", ["rank16", "dense"], indirect=True)
def test_a_model_that_ran_follows_what_is_loaded_into_it_and_copies_go_their_own_way(trained, tmp_path):
    export(str(trained), tmp_path / "packed", "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        twin = copy.deepcopy(model)
        mirrored = {
            name: value.flip(-1) if name.endswith("codes") else value for name, value in model.state_dict().items()
        }
        model.load_state_dict(mirrored)
        after = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path / "again")
        del model
        assert torch.equal(twin(input_ids=IDS).logits, before)
    assert not torch.equal(after, before) and torch.equal(logits(tmp_path / "again", IDS), after)


@pytest.mark.parametrize("trained", ["rank16"], indirect=True)
def test_what_a_bank_was_unpacked_to_goes_when_its_codes_are_replaced(trained, tmp_path):
    export(str(trained), tmp_path / "packed", "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    bank = next(m for m in model.modules() if isinstance(m, PackedBank))
    held = []
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=IDS)
            held += [weakref.ref(one.value.digits) for one in bank._unpacked.values()]
            bank.A_codes, bank.B_codes = bank.A_codes.clone(), bank.B_codes.clone()
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()  # as moving a model does
        model(input_ids=IDS)
    assert len(held) == 2 and not any(one() for one in held)


def test_generation_with_a_cache_and_any_batch_is_the_full_forward_pass(trained, tmp_path):
    export(str(trained), tmp_path / "packed", "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        alone = model(input_ids=IDS[1:2]).logits
        cache = model(input_ids=IDS[:, :10], use_cache=True).past_key_values
        steps = [model(input_ids=IDS[:, i : i + 1], past_key_values=cache).logits for i in range(10, 20)]
    assert torch.allclose(alone, whole[1:2], atol=2e-4)
    apart = (torch.cat(steps, 1) - whole[:, 10:]).norm(dim=-1) / whole[:, 10:].norm(dim=-1)
    # attention with a cache sums in another order, and a code on the edge may fall to the other side
    assert apart.median() < 1e-5 and apart.max() < 0.02


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train_model(training.load("smoke", ["ternary.enabled=true", "schedule.tokens=2048"]), folder / "out", quiet=True)
    export(str(folder / "out"), folder / "packed", "packed")
    return folder


def test_the_command_and_what_reads_its_folder(cli, one, tmp_path):
    done = cli("export", one / "out", "--to", "packed", "--format", "2bit", "-o", tmp_path / "packed", "--json")
    told = json.loads(done.stdout)
    assert told["max_logit_difference"] == 0 and 0 < told["ffn"]["bytes_ratio"] < told["ffn"]["stored_ratio"] / 4
    assert "| FFN |" in (tmp_path / "packed" / "README.md").read_text()
    cli("inspect", tmp_path / "packed", "--json")
    again = cli("export", tmp_path / "packed", "--to", "packed", "-o", tmp_path / "again", code=2)
    assert "is packed already" in again.stderr and not (tmp_path / "again").exists()


def test_a_narrower_type_moves_no_digit_and_bytes_are_those_on_disk(one, tmp_path):
    found = export(str(one / "out"), tmp_path / "packed", "packed", ExportOptions(dtype="bfloat16")).dump()
    whole, narrow = (load_file(folder / "model.safetensors") for folder in (one / "packed", tmp_path / "packed"))
    codes = [name for name in whole if name.endswith("_codes")]
    assert codes and all(torch.equal(whole[name], narrow[name]) for name in codes)
    assert whole["model.embed_tokens.weight"].dtype == torch.float32, "ternary models are trained and kept in float32"
    assert narrow["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert found["model"]["bytes"] == sum(tensor.nbytes for tensor in narrow.values())


def test_a_model_that_is_not_ternary_is_sent_to_training(tmp_path):
    train_model(training.load("smoke", ["schedule.tokens=1024"]), tmp_path / "out", quiet=True)
    with pytest.raises(BadInput, match="is not ternary: `pilon-compress train --heal"):
        export(str(tmp_path / "out"), tmp_path / "packed", "packed")
    assert not (tmp_path / "packed").exists()


def zero_scale(tensors, config):
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name].zero_()


def bad_bytes(tensors, config):
    next(tensor for name, tensor in tensors.items() if name.endswith("A_codes")).fill_(255)


def newer(tensors, config):
    config["quantization_config"]["format_version"] = 99


def odd_rank(tensors, config):
    next(iter(config["quantization_config"]["layout"]["banks"].values()))["rank"] += 1


@pytest.mark.parametrize("damage", [zero_scale, bad_bytes, newer, odd_rank])
def test_damage_is_one_line_and_nothing_loads(cli, tiny, one, tmp_path, damage):
    assert_refused(cli, tiny.damaged(one / "packed", tmp_path / "packed", damage))


def test_a_truncated_file_is_one_line(cli, one, tmp_path):
    weights = shutil.copytree(one / "packed", tmp_path / "packed") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(cli, weights.parent)


def assert_refused(cli, folder):
    done = cli("eval", folder, "--data", "stdlib:topics", code=2)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
