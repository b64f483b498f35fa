"""Models in whole numbers: exact codecs, real folders, bytes as reported, damage refused, whole conversions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import pilon_compress  # noqa: F401  registers the format
from pilon_compress.config import conversion
from pilon_compress.config.export import ExportOptions
from pilon_compress.convert import pipeline
from pilon_compress.convert.plan import BankPlan, Plan, trimmed
from pilon_compress.convert.prepare import asked_format, prepare
from pilon_compress.convert.solve.gptq import nearest
from pilon_compress.errors import BadInput
from pilon_compress.export.run import export
from pilon_compress.export.save import save_model
from pilon_compress.models.checkpoint import load_model
from pilon_compress.models.families import find_sites
from pilon_compress.nn.fold import fold, prune_unused
from pilon_compress.nn.formats.registry import grids
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import banks, dense_matrices, layout_of, projections
from pilon_compress.nn.size import ffn_size, model_size

KINDS = ("int8", "int4", "int3", "int2")
IDS = torch.arange(5, 25).reshape(2, 10)
PROSE = "\n\n".join(
    f"Paragraph {i}: the quick brown fox jumps over the lazy dog, again and again, until both of them are tired."
    for i in range(200)
)


def output(model, ids=IDS):
    with torch.no_grad():
        result = model(input_ids=ids)
    return result.logits if "logits" in result else result.last_hidden_state


def float_twin(tiny, family, dtype=torch.float32):
    """Shared banks, private ones and matrices, blocks with fewer neurons: in plain numbers."""
    model = tiny.tiny_model(family)
    shared = Plan(0.6, [[0, 1], [2]], [])
    roles = {}
    for site in find_sites(model):
        shared.host[site.name] = (site.d_in, site.d_out)
        roles.setdefault((site.role, site.layer == 2), []).append(trimmed(site, 41, 64))
    for (role, last), members in roles.items():
        if role == "down" and not last:
            shared.banks.append(BankPlan(0, role, tuple(members), 5, 3, 3))
        elif role == "down":
            shared.banks.append(BankPlan(1, role, tuple(members), 1, 9, 1))
        else:
            shared.matrices.extend(members)
    generator = torch.Generator().manual_seed(0)
    return initialise(install(model, shared.layout()), 0.1, generator).to(dtype).eval(), shared


def rounded(tiny, family, quantization, dtype=torch.float32):
    """Return the quantised model, and the plain model of its dequantised values."""
    plain, plan = float_twin(tiny, family, dtype)
    whole = install(tiny.tiny_model(family), plan.layout(quantization)).to(dtype).eval()
    source = dict(banks(plain))
    with torch.no_grad():
        for name, bank in banks(whole):
            for side, turned in (("A", False), ("B", True)):
                factor = getattr(source[name], side)
                found = nearest((factor.transpose(1, 2) if turned else factor).double(), quantization)
                getattr(bank, side).put(found.codes, found.scale)
                factor.copy_(found.values.transpose(1, 2) if turned else found.values)
        for (_, mine), (_, theirs) in zip(dense_matrices(whole), dense_matrices(plain), strict=True):
            found = nearest(theirs.weight.T[None].double(), quantization)
            mine.put(found.codes, found.scale)
            theirs.weight.copy_(found.values[0].T)
            if theirs.bias is not None:
                mine.bias.copy_(theirs.bias)
        for (_, mine), (_, theirs) in zip(projections(whole), projections(plain), strict=True):
            mine.weight.copy_(theirs.weight)
            mine.selected.copy_(theirs.selected)
    return whole, plain


def save(tiny, model, folder, **options):
    folder.mkdir(exist_ok=True)
    save_model(model, tiny.tiny_tokenizer(), folder, options.pop("dtype", torch.float32), **options)
    return str(folder)


def on_disk(folder, banks_and=(".mlp.", "pilon_banks")):
    tensors = [item for path in folder.glob("*.safetensors") for item in load_file(path).items()]
    return sum(t.nbytes for name, t in tensors if any(part in name for part in banks_and))


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 7), st.sampled_from(KINDS), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_codecs_are_exact_and_as_small_as_they_say(n, d, m, quantization, seed):
    grid = grids()[quantization]
    low, high = grid.range
    numbers = torch.randint(low, high + 1, (n, d, m), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    stored = grid.pack(numbers)
    assert stored.shape == (n, grid.size(d, m)[0]) and stored.element_size() == 1
    assert torch.equal(grid.unpack(stored, (d, m)), numbers)


def test_bits_lie_in_a_row():
    """The layout of files that exist: lowest bits first, the earlier of two numbers in the low half of a byte."""
    for quantization, numbers, stored in [
        ("int4", [-8, 7, 0], [0xF0, 0x08]),
        ("int3", [-4, 3, -3, 0, 1, -4, 2, 3, -3], [0b01_111_000, 0b0_101_100_0, 0b111_110_00, 0b001]),
        ("int2", [-2, -1, 0, 1, -1], [0b11_10_01_00, 0b01]),
    ]:
        found = grids()[quantization].pack(torch.tensor([[numbers]], dtype=torch.int8))
        assert found.tolist() == [stored]


def test_all_kinds_can_be_asked_for():
    for asked, expected in [("auto", None), *((name, name) for name in KINDS)]:
        assert asked_format(conversion.build({"model": "any", "form": {"bank_dtype": asked}})) == expected
    for asked in ("int5", "ternary", "none"):
        with pytest.raises(BadInput, match=f"bank_dtype '{asked}' is none of auto, int8, int4, int3, int2"):
            asked_format(conversion.build({"model": "any", "form": {"bank_dtype": asked}}))


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_whole_numbers_compute_what_they_stand_for_and_survive_saving(tiny, tmp_path, family, quantization):
    whole, plain = rounded(tiny, family, quantization)
    expected = output(whole)
    torch.testing.assert_close(expected, output(plain))
    for index, shard in enumerate(["5GB", "8KB"]):
        folder = save(tiny, whole, tmp_path / str(index), max_shard_size=shard)
        assert (len(list((tmp_path / str(index)).glob("*.safetensors"))) > 1) == (shard == "8KB")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert layout_of(loaded) == layout_of(whole) and torch.equal(output(loaded), expected)
        size = ffn_size(layout_of(loaded), 4)
        assert size.bytes == on_disk(tmp_path / str(index))
    base = AutoModel.from_pretrained(str(tmp_path / "0"))
    assert torch.equal(output(base), output(whole.base_model))
    assert torch.allclose(output(fold(loaded)), expected, atol=1e-5)
    numbers = on_disk(tmp_path / "0", ("",))
    assert model_size(layout_of(whole), tiny.tiny_model(family), 4).bytes == numbers


@pytest.mark.parametrize("quantization", KINDS)
def test_half_precision_keeps_numbers_and_scales(tiny, tmp_path, quantization):
    whole, _ = rounded(tiny, "gpt2", quantization)
    save(tiny, whole, tmp_path / "m")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    for (_, ours), (_, theirs) in zip(banks(half), banks(whole), strict=True):
        assert torch.equal(ours.A.scale, theirs.A.scale) and torch.equal(ours.B.weight, theirs.B.weight)
    exact = output(whole)
    assert (output(half).float() - exact).norm() < 0.05 * exact.norm()
    save(tiny, whole.float(), tmp_path / "again")  # .float() widens the scales in memory, not on disk
    assert on_disk(tmp_path / "again") == on_disk(tmp_path / "m")


@pytest.mark.parametrize("quantization", KINDS)
def test_primitives_that_no_layer_selects_are_dropped(tiny, quantization):
    whole, _ = rounded(tiny, "llama", quantization)
    for _, layer in projections(whole):
        layer.selected.remainder_(3)  # two of the five are free
    expected, before = output(whole), ffn_size(layout_of(whole)).bytes
    assert prune_unused(whole) > 0 and ffn_size(layout_of(whole)).bytes < before
    assert torch.equal(output(whole), expected)


@pytest.mark.parametrize("quantization", KINDS)
def test_exports_of_whole_numbers(tiny, tmp_path, quantization):
    whole, _ = rounded(tiny, "llama", quantization)
    save(tiny, whole, tmp_path / "m")
    export(str(tmp_path / "m"), tmp_path / "dense", "dense")
    assert "pilon" not in (tmp_path / "dense" / "config.json").read_text()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(output(dense), output(whole), atol=1e-5)
    found = export(str(tmp_path / "m"), tmp_path / "rest", "packed", ExportOptions(rest="int8")).dump()
    rest = AutoModelForCausalLM.from_pretrained(tmp_path / "rest")
    assert (output(rest) - output(whole)).norm() < 0.05 * output(whole).norm()
    assert found["model"]["bytes"] == on_disk(tmp_path / "rest", ("",)) and found["max_logit_difference"] == 0
    assert f"weights: {quantization}, a scale" in (tmp_path / "rest" / "README.md").read_text()


def test_self_contained_export_needs_no_installation(bare, tiny, tmp_path):
    whole, _ = rounded(tiny, "llama", "int3")
    save(tiny, whole, tmp_path / "m")
    export(str(tmp_path / "m"), tmp_path / "own", "self-contained")
    code = (
        "import torch; from transformers import AutoModelForCausalLM as M; "
        f"m = M.from_pretrained({str(tmp_path / 'own')!r}, trust_remote_code=True); "
        f"torch.save(m(torch.arange(5, 25).reshape(2, 10)).logits.detach(), {str(tmp_path / 'out.pt')!r}); "
        "import sys; assert 'pilon_compress' not in sys.modules"
    )
    bare.python(code)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt", weights_only=True), output(whole))


def zero_scale(tensors, config):
    next(t for name, t in tensors.items() if name.endswith("A.scale"))[0, 0, 0] = 0


def infinite_scale(tensors, config):
    next(t for name, t in tensors.items() if name.endswith("c_fc.scale")).fill_(float("inf"))


def lost(tensors, config):
    del tensors[next(name for name in tensors if name.endswith("B.weight"))]


def too_low(tensors, config):
    next(t for name, t in tensors.items() if name.endswith("A.weight")).fill_(-128)


def other_kind(tensors, config):
    next(iter(config["quantization_config"]["layout"]["banks"].values()))["quantization"] = "int5"


def other_rank(tensors, config):
    next(iter(config["quantization_config"]["layout"]["banks"].values()))["rank"] += 1


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "m"
    save(tiny, rounded(tiny, "gpt2", "int8")[0], folder)
    return folder


@pytest.mark.parametrize("damage", [zero_scale, infinite_scale, lost, too_low, other_kind, other_rank])
def test_damage_is_one_line_and_nothing_loads(tiny, sound, tmp_path, damage):
    with pytest.raises(BadInput) as refusal:
        load_model(str(tiny.damaged(sound, tmp_path / "m", damage)))
    assert len(str(refusal.value).splitlines()) == 1, refusal.value


def asked(tiny, place, ratio=0.7, quantization="int4", **more):
    settings = {"model": str(place / "dense"), "budget": {"ffn_ratio": ratio}, "form": {"bank_dtype": quantization}}
    settings |= {"calibration": {"data": str(place / "prose.txt"), "samples": 16, "batch_size": 8}}
    return conversion.build({**settings, "evaluation": {"data": "none"}, **more})


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny.save_tiny("bert", folder / "dense")
    (folder / "prose.txt").write_text(PROSE)
    return folder


@pytest.mark.parametrize(
    ("quantization", "budget"), [("int4", {}), ("int4", {"bands": 1, "rank": 4}), ("int3", {"bands": 1, "rank": 4})]
)
def test_conversion_reports_the_bytes_that_it_writes(tiny, place, tmp_path, quantization, budget):
    settings = asked(tiny, place, quantization=quantization, budget={"ffn_ratio": 0.7, **budget})
    report = pipeline.convert(settings, tmp_path / "out").dump()
    assert report["ffn"]["bytes_ratio"] < 0.45 * report["ffn"]["stored_ratio"] * 2  # float32 elsewhere
    model = AutoModel.from_pretrained(tmp_path / "out")
    layout = layout_of(model)
    assert layout.banks or layout.matrices
    assert {spec.quantization for spec in (*layout.banks.values(), *layout.matrices.values())} == {quantization}
    written = on_disk(tmp_path / "out", ("pilon_banks", "intermediate.dense", "output.dense"))
    attention = on_disk(tmp_path / "out", ("attention.output.dense",))
    assert report["ffn"]["bytes"] == written - attention


def test_a_conversion_that_was_cut_off_ends_as_one_that_was_not(tiny, place, tmp_path, monkeypatch):
    settings = asked(tiny, place, budget={"ffn_ratio": 0.7, "bands": [[0, 1], [2]], "rank": 4})
    pipeline.convert(settings, tmp_path / "whole")
    monkeypatch.setattr(pipeline, "build", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipeline.convert(settings, tmp_path / "cut")
    monkeypatch.undo()
    for number in (1, 2):
        (tmp_path / ".cut.partial" / f"layer.{number}.safetensors").unlink()
    pipeline.convert(settings, tmp_path / "cut")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_whole_numbers_are_not_refined(tiny, place):
    with pytest.raises(BadInput, match="cannot be refined"):
        prepare(asked(tiny, place, refine={"steps": 3}))
