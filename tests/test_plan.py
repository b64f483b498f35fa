"""Plans: they meet the budget, count everything, and refuse what is larger than dense."""

import pytest

from pilon_compress.convert.plan import make_plan, split_bands
from pilon_compress.errors import BadInput
from pilon_compress.families import Site
from pilon_compress.form.layout import Layout
from pilon_compress.measure.size import bank_size, ffn_size
from pilon_compress.recipe import Budget

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
        assert bank.top_k * bank.rank >= bank.private_rank() - bank.rank, "a layer may select its even share"


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
