"""Rounding that makes up for itself: exact where it can be, better than the nearest numbers where inputs correlate."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.sharing.joint_fit import fit_bank
from pilon_compress.convert.solve.gptq import nearest, round_bank, round_matrix, round_rows
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.models.families import Site
from pilon_compress.nn.formats.integer import IntegerGrid
from pilon_compress.nn.formats.registry import grids

KINDS = ("int8", "int4", "int3", "int2")


def target(d_in=96, d_out=40, seed=0, layer=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_in, d_out, generator=generator, dtype=torch.float64)
    few = torch.randn(500, d_in // 6, generator=generator, dtype=torch.float64)
    x = few @ torch.randn(d_in // 6, d_in, generator=generator, dtype=torch.float64)
    x += 0.3 * torch.randn(500, d_in, generator=generator, dtype=torch.float64)
    return Target.of("t", layer, weight, x.T @ x / 500)


def plan(layers, n, r, k, d_in=96, d_out=40):
    sites = tuple(Site(f"s{i}", i, "up", d_in, d_out, True, f"s{i}") for i in range(layers))
    return BankPlan(0, "up", sites, n, r, k)


@given(st.integers(1, 3), st.integers(1, 150), st.integers(1, 5), st.sampled_from(KINDS), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_nearest_is_within_range_and_half_a_step_or_clipped(n, d, m, quantization, seed):
    grid = grids()[quantization]
    weight = torch.randn(n, d, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = nearest(weight, quantization)
    low, high = grid.range
    assert found.scale.dtype == torch.bfloat16 and bool(found.scale.all()) and found.codes.dtype == torch.int8
    assert found.codes.min() >= low and found.codes.max() <= high
    step = grid.spread(found.scale.double(), d).abs()
    inside = (found.codes > low) & (found.codes < high)
    assert ((found.values - weight).abs() <= 0.5001 * step)[inside].all()


@pytest.mark.parametrize("quantization", KINDS)
def test_few_bits_have_so_many_numbers_and_zeros_stay_zeros(quantization):
    grid, zeros = grids()[quantization], torch.zeros(1, 70, 2, dtype=torch.float64)
    low, high = grid.range
    assert high - low + 1 == (255 if grid.bits == 8 else 2**grid.bits)
    assert grid.scales(zeros).all() and not nearest(zeros, quantization).values.any()


@pytest.mark.parametrize("quantization", KINDS)
def test_what_is_whole_already_stays_as_it_is(quantization):
    low, high = grids()[quantization].range
    codes = torch.randint(low, high + 1, (1, 96, 40), generator=torch.Generator().manual_seed(0)).double()
    codes[:, ::64] = low  # so that every group reaches its end
    one = target()
    exact = Target("t", 0, codes[0] * 0.125, one.metric)
    assert torch.equal(round_matrix(exact, quantization).values[0], exact.weight)
    assert torch.equal(nearest(exact.weight[None], quantization).values[0], exact.weight)


def test_each_row_makes_up_for_those_before_it():
    """Against the definition: round one row, solve for all rows that are free, in float64."""
    one = target(12, 5)
    scale = torch.full_like(one.weight, 0.5)
    order = one.metric.diagonal().argsort(descending=True).tolist()
    W, free, expected = one.weight.clone(), list(order), torch.empty_like(one.weight)
    for row in order:
        expected[row] = (W[row] / 0.5).round().clamp(-8, 7)
        free.remove(row)
        moved = W[row] - expected[row] * 0.5
        if free:
            C = one.metric[free]
            W[free] += torch.linalg.solve(C[:, free], C[:, [row]] @ moved[None])
    assert torch.equal(round_rows(one.weight, scale, one.metric, IntegerGrid(4)).double(), expected)


@pytest.mark.parametrize("d_in", [96, 300])
def test_matrices_lose_less_than_by_the_nearest_numbers(d_in):
    one = target(d_in)
    plain, ours = (
        [one.output_loss(find(quantization).values[0]) for quantization in KINDS]
        for find in (lambda kind: nearest(one.weight[None], kind), lambda kind: round_matrix(one, kind))
    )
    assert all(0 < mine < 0.5 * theirs for mine, theirs in zip(ours, plain, strict=True))
    assert all(more < less / 3 for more, less in pairwise(ours))  # from many bits to few


@pytest.mark.parametrize(("layers", "n", "r", "k"), [(1, 1, 24, 1), (2, 8, 6, 6)])
def test_banks_lose_less_than_by_the_nearest_numbers(layers, n, r, k):
    targets = [target(seed=index, layer=index) for index in range(layers)]
    asked = plan(layers, n, r, k)
    fit = fit_bank(targets, asked, sweeps=8)
    before = [one.output_loss(fit.approximation(i)) for i, one in enumerate(targets)]
    near = nearest(fit.A, "int4").values, nearest(fit.B.transpose(1, 2), "int4").values.transpose(1, 2)
    plain = replace(fit, A=near[0], B=near[1])
    fit, A, B = round_bank(fit, targets, asked, "int4")
    assert A.codes.shape == (n, 96, r) and B.codes.shape == (n, 40, r)
    assert torch.equal(fit.A, A.values) and torch.equal(fit.B, B.values.transpose(1, 2))
    for index, one in enumerate(targets):
        assert one.output_loss(fit.approximation(index)) < one.output_loss(plain.approximation(index))
        assert one.output_loss(fit.approximation(index)) < before[index] + 0.02
