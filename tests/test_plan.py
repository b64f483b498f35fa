"""Plans: they meet the budget, count everything, and are what a conversion makes."""

import json

import pytest

from pilon_compress.config import conversion
from pilon_compress.config.budget import Budget
from pilon_compress.convert import pipeline
from pilon_compress.convert.allocate.uniform import check_limits, make_plan
from pilon_compress.convert.prepare import prepare
from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site
from pilon_compress.nn.bands import split_bands
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.size import bank_size, ffn_size

SHAPES = {"tiny": (32, 64), "MiniLM": (384, 1536), "GPT-2": (768, 3072), "Llama-1B": (2048, 8192)}


def sites(shape, layers=6, bias=True):
    d, inner = SHAPES[shape]
    return [
        Site(f"layers.{layer}.{role}", layer, role, d_in, d_out, bias, f"layers.{layer}.{role}")
        for layer in range(layers)
        for role, d_in, d_out in (("up", d, inner), ("down", inner, d))
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("method", ["pilon", "whitened-svd"])
def test_the_plan_fills_the_budget_and_never_exceeds_it(shape, ratio, method):
    plan = make_plan(sites(shape), Budget(ffn_ratio=ratio), method, "component")
    size = ffn_size(plan.layout())
    reached = size.stored / size.dense_stored
    slack = 0.06 if shape == "tiny" else 0.03
    assert ratio - max(slack, 0.05 * ratio) <= reached <= ratio
    assert size.macs <= size.dense_macs
    if method == "whitened-svd":
        assert size.macs / size.dense_macs <= ratio


def test_stored_size_is_what_the_file_holds():
    plan = make_plan(sites("tiny"), Budget(ffn_ratio=0.5), "pilon", "component")
    for bank in plan.banks:
        n, r, k, layers = bank.n_primitives, bank.rank, bank.top_k, len(bank.sites)
        by_hand = n * bank.d_in * r + n * r * bank.d_out + layers * (k * r + k + bank.d_out)
        assert bank.stored() == by_hand == bank_size(plan.layout(), bank.name).stored
        assert bank.dense_stored() == layers * (bank.d_in * bank.d_out + bank.d_out)
        even = n * r // layers
        assert bank.top_k * bank.rank >= even - bank.rank, "a layer may select its even share"


def test_bytes_count_indices_at_eight_and_numbers_at_their_width():
    layout = make_plan(sites("tiny", 1), Budget(ffn_ratio=0.5), "pilon", "component").layout()
    half, full = ffn_size(layout, 2), ffn_size(layout, 4)
    indices = sum(p.top_k for p in layout.projections.values())
    assert half.bytes == (half.stored - indices) * 2 + indices * 8
    assert full.bytes - half.bytes == (half.stored - indices) * 2
    assert half.dense_bytes == full.dense_bytes == half.dense_stored * 2


def test_overrides_are_kept():
    budget = Budget(ffn_ratio=0.5, n_primitives=10, rank=4, top_k=3, bands=3)
    plan = make_plan(sites("tiny"), budget, "pilon", "scalar")
    assert {(b.n_primitives, b.rank, b.top_k) for b in plan.banks} == {(10, 4, 3)}
    assert plan.bands == [[0, 1], [2, 3], [4, 5]]
    assert all(p.composition == "scalar" for p in plan.layout().projections.values())


def test_bands():
    assert split_bands(list(range(6)), None) == [[0, 1, 2], [3, 4, 5]]
    assert [len(b) for b in split_bands(list(range(16)), None)] == [3, 2, 3, 3, 2, 3]
    assert split_bands([1, 2, 5], [[5], [1, 2]]) == [[5], [1, 2]]
    for wrong in (0, 7, [[0, 1]], [[0, 1, 2, 3, 4, 5], [5]]):
        with pytest.raises(BadInput):
            split_bands(list(range(6)), wrong)


def test_larger_than_dense_is_refused_unless_allowed():
    with pytest.raises(BadInput, match="more than the dense model"):
        make_plan(sites("tiny"), Budget(ffn_ratio=0.5, rank=16, n_primitives=12), "pilon", "component")
    full = Budget(ffn_ratio=2, allow_larger=True)
    plan = make_plan(sites("tiny"), full, "pilon", "component")
    assert all(b.n_primitives * b.rank >= len(b.sites) * 32 for b in plan.banks), "full rank for every layer"


def test_private_methods_take_no_sharing_options():
    with pytest.raises(BadInput, match="shares nothing"):
        make_plan(sites("tiny"), Budget(ffn_ratio=0.5, top_k=2), "svd", "component")


def test_a_budget_too_small_for_anything_is_refused():
    with pytest.raises(BadInput, match="too small"):
        make_plan(sites("tiny"), Budget(ffn_ratio=0.001), "pilon", "component")


def test_layout_survives_json():
    layout = make_plan(sites("tiny"), Budget(ffn_ratio=0.5), "pilon", "component").layout()
    assert Layout.from_dict(layout.to_dict()) == layout


# --- both limits


@pytest.mark.parametrize("shape", ["MiniLM", "Llama-1B"])
@pytest.mark.parametrize("ratio", [0.9, 0.4])
@pytest.mark.parametrize(
    "given",
    [
        {"mac_ratio": 0.5, "bands": 2},
        {"mac_ratio": 0.3, "rank": 8},
        {"mac_ratio": 0.4, "n_primitives": 24},
        {"mac_ratio": 0.4, "n_primitives": 12, "bands": 1},
        {"mac_ratio": 0.25, "top_k": 4},
        {"optimize": "compute", "bands": 1},
        {"optimize": "compute", "rank": 16, "top_k": 6},
        {"top_k": 4},
        {"top_k": 7, "bands": 3},
        {"n_primitives": 20},
        {"n_primitives": 20, "top_k": 8},
    ],
    ids=lambda given: " ".join(f"{key}={value}" for key, value in given.items()),
)
@pytest.mark.parametrize("composition", ["component", "scalar"])
def test_given_shapes_keep_both_limits_and_use_every_primitive(shape, ratio, given, composition):
    budget = Budget(ffn_ratio=ratio, **given)
    plan = make_plan(sites(shape), budget, "pilon", composition)
    check_limits(plan, budget)
    size = ffn_size(plan.layout()).over_dense().dump()
    limit = budget.mac_limit or 1
    assert size["stored_ratio"] <= ratio and size["mac_ratio"] <= limit
    assert all(bank.n_primitives <= bank.top_k * len(bank.sites) for bank in plan.banks)
    assert size["macs"] == sum(bank.macs() for bank in plan.banks)
    if set(given) <= {"bands", "top_k", "mac_ratio"}:
        assert size["stored_ratio"] >= 0.93 * min(ratio, limit), "the budget is spent as far as the MACs allow"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"n_primitives": 40, "top_k": 3, "rank": 1}, "can use 9: lower n_primitives, or raise top_k"),
        ({"n_primitives": 30, "rank": 16, "top_k": 20, "mac_ratio": 0.5}, "above the limit 0.5"),
        ({"n_primitives": 40, "rank": 16, "ffn_ratio": 0.5}, "above the ratio 0.5"),
        ({"rank": 500}, "above the full rank 384"),
        ({"rank": 64, "mac_ratio": 0.1}, "with MACs of at most 0.1 is too small"),
        ({"top_k": 400, "ffn_ratio": 0.1}, "too small for a bank of 400 selected by each layer"),
    ],
)
def test_shapes_that_cannot_hold_are_refused_in_one_line(given, told):
    budget = Budget(**given)
    with pytest.raises(BadInput) as refusal:
        check_limits(make_plan(sites("MiniLM"), budget, "pilon", "component"), budget)
    assert told in str(refusal.value) and "\n" not in str(refusal.value)


# --- the plan that is announced is the plan that is made


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with tiny models and a text."""
    folder = tmp_path_factory.mktemp("place")
    for family in ("bert", "llama"):
        tiny.save_tiny(family, folder / family)
    lines = (
        f"Paragraph {chr(97 + i % 26)}{chr(97 + i // 26)} tells of {'many ' * (i % 5)}things and of nothing else "
        "but the very things it names."
        for i in range(60)
    )
    (folder / "prose.txt").write_text("\n\n".join(lines))
    return folder


def asked(place, family, **more):
    calibration = {"data": str(place / "prose.txt"), "samples": 16, "sequence_length": 64}
    settings = {"model": str(place / family), "calibration": calibration, "evaluation": {"data": "none"}}
    return conversion.build({**settings, **more})


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"budget": {"ffn_ratio": 0.5}}),
        ("llama", {"budget": {"ffn_ratio": 0.6, "mac_ratio": 0.4}}),
        ("llama", {"scope": {"targets": ["re:.*down_proj"]}}),
        ("llama", {"budget": {"ffn_ratio": 0.6, "bands": 1, "mac_ratio": 0.9}}),
        ("bert", {"budget": {"ffn_ratio": 0.6, "top_k": 4}}),
        ("bert", {"budget": {"ffn_ratio": 0.7, "share": "auto"}, "effort": "fast"}),
        ("bert", {"budget": {"ffn_ratio": 0.7}, "form": {"bank_dtype": "int4"}}),
        ("bert", {"method": "svd"}),
    ],
    ids=str,
)
def test_the_announced_plan_is_made(place, tmp_path, family, more):
    settings = asked(place, family, **more)
    announced = pipeline.settle(prepare(settings))
    assert announced.final
    report = json.loads(json.dumps(pipeline.convert(settings, tmp_path / "out").dump()))
    del report["ffn"]["shared_primitives"]  # which layers select which primitive is known once banks are fitted
    for key, value in json.loads(json.dumps(announced.describe().dump())).items():
        assert report[key] == value, key
    budget = settings.budget
    assert report["ffn"]["stored_ratio"] <= budget.stored_limit and report["ffn"]["mac_ratio"] <= (
        budget.mac_limit or 1
    )


@pytest.mark.parametrize("more", [{}, {"form": {"bank_dtype": "int8"}}], ids=["float", "int8"])
def test_at_ratio_one_nothing_is_sized(place, tmp_path, monkeypatch, more):
    def sized(*_):
        raise AssertionError("sized, where nothing can be dropped")

    monkeypatch.setattr("pilon_compress.convert.solve.feed_forward.eliminate", sized)
    monkeypatch.setattr("pilon_compress.convert.planning.size_layers", sized)
    monkeypatch.setattr("pilon_compress.convert.calibrate.sensitivity.Sensitivity.measure", sized)
    settings = asked(place, "bert", budget={"ffn_ratio": 1.0}, **more)
    assert prepare(settings).final
    report = pipeline.convert(settings, tmp_path / "out").dump()
    assert report["ffn"]["stored"] == report["ffn"]["dense_stored"] and not report["banks"]


def test_a_float32_source_is_compared_with_its_own_bytes_and_with_bfloat16(place, tmp_path):
    report = pipeline.convert(asked(place, "bert", budget={"ffn_ratio": 0.5}), tmp_path / "out").dump()
    ffn, whole = report["ffn"], report["model"]
    assert report["source_dtype"] == report["dtype"] == "float32"
    assert ffn["bytes_ratio_to_source"] == pytest.approx(ffn["stored_ratio"], rel=0.05)
    assert ffn["bytes_ratio_to_bf16"] == pytest.approx(2 * ffn["bytes_ratio_to_source"])
    assert whole["bytes"] < whole["source_bytes"] == 2 * whole["dense_bytes"]
