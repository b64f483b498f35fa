"""Fitting behind converted layers: nothing moves where nothing was lost, and what was lost is made up for."""

import copy

import pytest
import torch
from torch import nn

from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.convert.solve.sequential_targets import BlockPair
from pilon_compress.data.batch import Batch
from pilon_compress.models.blocks import blocks
from pilon_compress.models.families import find_sites
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source


def start(tiny, family, perturbed):
    """A dense model's second block beside a copy of it, whose stream came through a damaged first block."""
    model = tiny.tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (24, 20), generator=generator)
    source = Source(model)
    theirs = Stream(source, [Batch(part, torch.ones_like(part)) for part in ids.split(8)])
    ours = theirs.fork()
    first = list(blocks(model).values())[0]
    damaged = copy.deepcopy(first)
    if perturbed:
        for parameter in damaged.parameters():
            parameter.data += 0.1 * parameter.std().nan_to_num(0) * torch.randn(parameter.shape, generator=generator)
    theirs.advance(first)
    ours.advance(damaged)
    module = list(blocks(model).values())[1]
    return model, module, BlockPair(module, copy.deepcopy(module), theirs, ours), source.names[1]


def local(model, prefix, role):
    site = next(s for s in find_sites(model) if s.role == role and s.name.startswith(f"{prefix}."))
    return site, site.name.removeprefix(f"{prefix}.")


def dense_target(pair, site, name):
    weight = pair.dense.get_submodule(name).weight.detach().double()
    weight = weight if type(pair.dense.get_submodule(name)).__name__ == "Conv1D" else weight.T
    return Target(site.name, 1, weight, torch.eye(site.d_in, dtype=torch.float64))


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "distilbert", "gpt_neox", "opt", "gemma2"])
def test_identical_streams_give_the_dense_weight_back(tiny, family):
    model, _, pair, prefix = start(tiny, family, perturbed=False)
    site, name = local(model, prefix, "down")
    pair.inputs(down=name)
    cross = pair.output(name)
    target = cross.target(dense_target(pair, site, name), site.bias)
    torch.testing.assert_close(target.weight, dense_target(pair, site, name).weight, rtol=1e-3, atol=1e-4)
    if site.bias:
        bias = pair.dense.get_submodule(name).bias.detach().double()
        torch.testing.assert_close(cross.bias(target.weight), bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_down_makes_up_for_what_the_stream_has_lost(tiny, family):
    """Pre-LN and post-LN: the block's output comes closer to the dense one than with the dense weights."""
    model, module, pair, prefix = start(tiny, family, perturbed=True)
    site, name = local(model, prefix, "down")
    theirs, ours = pair.theirs.fork(), pair.stream.fork()
    theirs.advance(module)

    def error():
        moved = ours.fork()
        moved.advance(pair.converted)
        return sum(float((a - b).square().sum()) for a, b in zip(moved.hidden, theirs.hidden, strict=True))

    before = error()
    pair.inputs(down=name)
    cross = pair.output(name)
    target = cross.target(dense_target(pair, site, name), site.bias)
    linear = nn.Linear(site.d_in, site.d_out, bias=site.bias)
    linear.weight.data = target.weight.T.float()
    if site.bias:
        linear.bias.data = cross.bias(target.weight).float()
    pair.converted.set_submodule(name, linear)
    assert error() < 0.9 * before
    pair.finish()
    assert pair.theirs.position == pair.stream.position == 2
    torch.testing.assert_close(pair.theirs.hidden[0], theirs.hidden[0])
