"""Compare the measured cost of trimming a layer with its effect on the model's predictions."""

import copy
from functools import partial

import pytest
import torch

from pilon_compress.convert.calibrate.second_moments import gather
from pilon_compress.convert.calibrate.sensitivity import Change, Sensitivity
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.convert.solve.neuron_pruning import refit
from pilon_compress.data.batch import Batch
from pilon_compress.models.families import find_sites
from pilon_compress.models.source import Source


@pytest.fixture
def dense(tiny):
    model = tiny.tiny_model("llama")
    ids = torch.randint(5, 250, (12, 16), generator=torch.Generator().manual_seed(0))
    return model, [Batch(part, torch.ones_like(part)) for part in ids.split(2)]


def test_the_measured_loss_is_the_divergence_of_the_whole_model(dense):
    model, batches = dense
    source, sites = Source(model), find_sites(model)
    moments = gather(source, batches, sites, causal=True)
    sensitivity = Sensitivity(source, batches, causal=True)
    block = Dense(source, sites, moments).read(1)
    prune = partial(block.prune, prefix=source.names[1], neurons=20)
    scale, again = sensitivity.measure(1, [Change(prune, block.elimination.loss(20))] * 2)
    assert scale == again, "each change by itself"

    left = block.elimination.left(20)
    trimmed = copy.deepcopy(model)
    down = trimmed.model.layers[1].mlp.down_proj
    weight = refit(block.weights[block.down.name], block.metrics[block.down.name], left)
    with torch.no_grad():
        down.weight.copy_(torch.zeros(down.in_features, down.out_features).index_copy(0, left, weight.float()).T)
        shown = torch.cat([batches[i].input_ids for i in (0, 2, 4)])  # three of six batches
        ours, theirs = (one(shown).logits.log_softmax(-1) for one in (trimmed, model))
    lost = 2 * (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert scale == pytest.approx(lost / block.elimination.loss(20), rel=0.03)


@pytest.mark.parametrize(("batches", "texts"), [(6, 6), (1, 5)])
def test_a_part_of_the_text_is_measured_even_where_it_is_one_batch(dense, batches, texts):
    model, text = dense
    ids = torch.cat([batch.input_ids for batch in text])
    parts = [Batch(part, torch.ones_like(part)) for part in ids.split(len(ids) // batches)]
    stream = Sensitivity(Source(model), parts, causal=True).stream
    assert sum(len(hidden) for hidden in stream.hidden) == texts, "3 layers: 1.5 / 3.5 of 12 texts"
