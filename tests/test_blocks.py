"""Check the options of a block: neurons leave all its projections together, and costs are as stated."""

import pytest
import torch

from pilon_compress.convert.allocate.budget import Sizing, allocate
from pilon_compress.convert.allocate.options import options_of, savings_of
from pilon_compress.convert.allocate.uniform import preview
from pilon_compress.convert.calibrate.second_moments import gather
from pilon_compress.convert.plan import down_of
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models.families import FAMILIES, find_sites
from pilon_compress.models.source import Source
from pilon_compress.nn.size import ffn_size

RATIOS = (0.3, 0.5, 0.8)


def sized(tiny, family, falling=False, **scope):
    """Return every layer of a tiny model as a `FeedForward`, measured on a little random text.

    `falling`: singular values fall as they do in trained models, so that factors are worth their place.
    """
    model = tiny.tiny_model(family)
    source, sites = Source(model), find_sites(model, **scope)
    for site in sites if falling else ():
        weight = model.base_model.get_submodule(site.name).weight.data
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(U * (S * torch.exp(-torch.arange(len(S)) / 4)) @ Vh)
    ids = torch.randint(5, 200, (8, 24), generator=torch.Generator().manual_seed(0))
    moments = gather(source, [Batch(ids, torch.ones_like(ids))], sites, causal=family not in tiny.ENCODERS)
    dense = Dense(source, sites, moments)
    return [dense.read(layer) for layer in sorted(dense.layers())]


def by_hand(block, choice):
    """Loss of the approximation that `choice` stands for: neurons that go, the refit, then truncation."""
    left = None if choice.neurons is None else block.elimination.left(choice.neurons)
    total = 0.0
    for site in block.sites:
        name, rank = site.name, choice.ranks[site.name]
        target = block.target(site, left)
        approximation = target.weight if rank is None else target.truncated("pilon", rank)
        total += target.loss(approximation)
        if left is not None and site == block.down:
            whole = block.target(site, None)
            total += whole.loss(torch.zeros_like(whole.weight).index_copy(0, left, target.weight))
        assert rank is None or rank * sum(approximation.shape) < approximation.numel(), "factors only where smaller"
        assert name in choice.ranks
    return total


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "bert"])
def test_an_options_loss_and_size_are_those_of_the_approximation(tiny, family):
    block = sized(tiny, family, falling=True)[1]
    options = options_of(block, savings_of(block, 0.5))
    assert {option.what.neurons for option in options} > {None}, "whole, and with fewer neurons"
    assert any(rank is not None for option in options for rank in option.what.ranks.values())
    largest = max(option.loss for option in options)
    for option in options[:: max(1, len(options) // 12)]:
        assert option.loss == pytest.approx(by_hand(block, option.what), rel=1e-5, abs=1e-7 * largest)
    stored, losses = [o.stored for o in options], [o.loss for o in options]
    assert stored == sorted(stored) and losses == sorted(losses, reverse=True), "more numbers, less loss"
    assert losses[-1] < 1e-9 * largest and stored[-1] == sum(site.parameters for site in block.sites)
    twice = options_of(block, savings_of(block, 0.5), scale=2.0)
    assert [o.loss for o in twice] == pytest.approx([2 * loss for loss in losses])


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "bert"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_an_allocation_counts_what_its_layout_stores(tiny, family, ratio):
    blocks = sized(tiny, family)
    sizings = [Sizing(b.layer, b.sites, options_of(b, savings_of(b, ratio)), 1.0, b.elimination) for b in blocks]
    found = allocate(sizings, ratio, mac_ratio=ratio)
    size = ffn_size(found.plan.layout())
    assert 0.95 * ratio < size.stored / size.dense_stored <= ratio
    assert size.macs / size.dense_macs <= ratio
    assert (
        sum(bank.stored() for bank in found.plan.banks) + sum(s.parameters for s in found.plan.matrices) == size.stored
    )
    for block in blocks:
        left = found.left[block.layer]
        for site in block.sites:
            whole, own = found.plan.layout().host_shape(site.name), found.plan.layout().shape(site.name)
            assert whole == (site.d_in, site.d_out)
            if left is not None:
                narrow = (len(left), site.d_out) if site == block.down else (site.d_in, site.d_out // 64 * len(left))
                assert own == narrow


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_ranks_can_be_asked_to_be_multiples(tiny, family):
    blocks = sized(tiny, family, falling=True)
    for block in blocks:
        ranks = [
            rank
            for one in options_of(block, savings_of(block, 0.5), multiple=4)
            for rank in one.what.ranks.values()
            if rank
        ]
        assert ranks and all(rank % 4 == 0 for rank in ranks)
    sizings = [
        Sizing(b.layer, b.sites, options_of(b, savings_of(b, 0.5), multiple=4), 1.0, b.elimination) for b in blocks
    ]
    size = ffn_size(allocate(sizings, 0.5).plan.layout())
    assert 0.95 * 0.5 < size.stored / size.dense_stored <= 0.5, "neurons spend what ranks leave"


def test_a_ratio_below_the_smallest_options_is_refused(tiny):
    sizings = [
        Sizing(b.layer, b.sites, options_of(b, savings_of(b, 0.5)), 1.0, b.elimination) for b in sized(tiny, "gpt2")
    ]
    with pytest.raises(BadInput, match="too small"):
        allocate(sizings, 0.001)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_whole_blocks(tiny, family):
    sites = find_sites(tiny.tiny_model(family))
    assert preview(sites, 0.5) is not None
    for layer in range(3):
        down = down_of([site for site in sites if site.layer == layer])
        assert down is not None and down.role == "down" and down.d_in == 64


@pytest.mark.parametrize("pattern", ["gate", "up", "down"])
def test_neurons_stay_where_a_projection_of_the_block_stays_dense(tiny, pattern):
    block, *_ = sized(tiny, "llama", ignore=[rf"re:.*\.{pattern}_proj"])
    assert len(block.sites) == 2 and block.down is None and block.elimination is None
    assert all(option.what.neurons is None for option in options_of(block, savings_of(block, 0.5)))
    assert preview(block.sites, 0.5) is None


def test_projections_outside_the_feed_forward_block_only_get_ranks(tiny):
    block, *_ = sized(tiny, "bert", targets=["re:.*attention.*(query|key)"])
    assert block.down is None and {option.what.neurons for option in options_of(block, savings_of(block, 0.5))} == {
        None
    }


def test_a_fused_projection_loses_both_halves_of_a_neuron(tiny):
    block, *_ = sized(tiny, "phi3")
    fused = next(site for site in block.sites if site.role == "gate_up")
    assert block.columns(fused, torch.tensor([0, 5, 63])).tolist() == [0, 5, 63, 64, 69, 127]
