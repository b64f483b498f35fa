"""Sharing lowers the surrogate loss where it is chosen, stores no more, and survives the road to disk."""

import json

import torch
from safetensors.torch import load_file

from pilon_compress.config.conversion import build
from pilon_compress.convert.allocate.budget import allocate, size_layers
from pilon_compress.convert.calibrate.second_moments import gather
from pilon_compress.convert.pipeline import convert
from pilon_compress.convert.sharing.search import Sharing
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.data.batch import Batch
from pilon_compress.models.families import find_sites
from pilon_compress.models.source import Source
from pilon_compress.nn.size import ffn_size


def alike(tiny):
    """A model whose layers' feed-forward blocks are nearly the same: sharing must pay."""
    model = tiny.tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            for mine, first in zip(layer.mlp.parameters(), model.model.layers[0].mlp.parameters(), strict=True):
                mine.copy_(first + 0.02 * mine)
    return model


def test_bands_share_where_that_lowers_the_loss_and_within_what_they_stored(tiny):
    model = alike(tiny)
    source, sites = Source(model), find_sites(model)
    ids = torch.randint(5, 250, (8, 32), generator=torch.Generator().manual_seed(0))
    moments = gather(source, [Batch(ids, torch.ones_like(ids))], sites, causal=True)
    dense = Dense(source, sites, moments)
    sizings = size_layers(dense, 0.4)
    alone = allocate(sizings, 0.4)
    together, fits = Sharing(dense, 30).apply(sizings, alone, [[0, 1, 2]])
    assert fits and together.plan.bands == [[0, 1, 2]], "layers that are alike share"
    assert sum(together.losses.values()) < 0.7 * sum(alone.losses.values())
    stored, limit = (ffn_size(one.plan.layout()).stored for one in (together, alone))
    assert stored <= limit
    apart, none = Sharing(dense, 30).apply(sizings, alone, [[0], [1], [2]])
    assert not none and apart.losses == alone.losses and apart.plan.layout() == alone.plan.layout()


def test_shared_banks_are_saved_once(tiny, tmp_path):
    model = alike(tiny)
    model.save_pretrained(tmp_path / "dense")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("Some words about nothing, again and again. " * 400)
    asked = {
        "model": str(tmp_path / "dense"),
        "budget": {"ffn_ratio": 0.4, "sharing": "auto"},
        "calibration": {"data": str(tmp_path / "text.txt"), "samples": 16, "sequence_length": 32, "batch_size": 8},
        "evaluation": {"data": str(tmp_path / "text.txt"), "window": 32, "samples": 8},
    }
    report = convert(build(asked), tmp_path / "out").dump()
    tensors = load_file(tmp_path / "out/model.safetensors")
    banks = {name for name in tensors if name.endswith(".A")}
    assert len(banks) == 3 and report["plan"]["bands"] == [[0, 1, 2]]
    assert report["ffn"]["stored_ratio"] <= 0.4 and report["evaluation"]["perplexity_ratio"] < 1.5
    layout = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["layout"]
    assert {spec["bank"] for spec in layout["projections"].values()} == {"band0.gate", "band0.up", "band0.down"}
