"""Tiered banks: equal logits, files, memory limits, training with promotions, resume, refusals."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from pilon_compress.errors import BadInput
from pilon_compress.export.save import save_model
from pilon_compress.models import checkpoint
from pilon_compress.models.families import find_sites
from pilon_compress.nn.init import initialise
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import neuron_projections, projections
from pilon_compress.nn.layout import Layout
from pilon_compress.nn.specs import BankSpec, ProjectionSpec, RouterSpec
from pilon_compress.tiers.modules import Tiered
from tests.test_neuron_banks import layout_for

IDS = torch.randint(6, 200, (2, 9), generator=torch.Generator().manual_seed(3))


def factors(model, experts=1):
    """Layers 0 and 1 share a bank of each role, layer 2 has its own; each selects 5 of 8 primitives of rank 4."""
    sites = find_sites(model)
    banks = {f"band{b}.{site.role}": BankSpec(site.d_in, site.d_out, 8, 4) for site in sites for b in (0, 1)}
    users = {
        site.name: ProjectionSpec(f"band{int(site.layer == 2)}.{site.role}", 5, site.bias, experts=experts)
        for site in sites
    }
    blocks = dict.fromkeys(sorted({site.name.rpartition(".")[0] for site in sites}), RouterSpec(32, experts, 2))
    return Layout(banks, users, routers=blocks if experts > 1 else {})


FORMS = {
    "factors": factors,
    "experts": lambda model: factors(model, experts=3),
    "neurons": layout_for,
    "all neurons": lambda model: layout_for(model, top_k=48),
}


def saved(tiny, folder, family="llama", form="factors", dtype=torch.float32):
    """Save a random PILON model with scattered selections, and return the folder."""
    model = tiny.tiny_model(family)
    install(model, FORMS[form](model))
    generator = torch.Generator().manual_seed(1)
    initialise(model, 0.3, generator)
    with torch.no_grad():
        for _, layer in (*projections(model), *neuron_projections(model)):
            if layer.weight.requires_grad:
                layer.weight.mul_(1 + 0.3 * torch.randn(layer.weight.shape, generator=generator))
        for _, layer in projections(model):
            order = [torch.randperm(8, generator=generator)[:5] for _ in range(layer.experts)]
            layer.selected.copy_(order[0] if layer.selected.dim() == 1 else torch.stack(order))
        for _, layer in neuron_projections(model):
            if layer.owns:
                layer.selection.selected.copy_(torch.randperm(48, generator=generator)[: layer.top_k])
    save_model(model.to(dtype), tiny.tiny_tokenizer(), folder, dtype)
    return folder


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_tiered_logits_are_those_of_the_resident_model_bit_for_bit(tiny, tmp_path, family, form):
    folder = saved(tiny, tmp_path / "m", family, form)
    resident = checkpoint.load_model(str(folder))
    for n_hot in (0.01, 0.25, 0.9):
        tiered = checkpoint.load_model(str(folder), n_hot=n_hot)
        assert any(isinstance(part, Tiered) for part in tiered.modules())
        assert torch.equal(logits(tiered), logits(resident))
        assert torch.equal(logits(tiered), logits(resident))  # again, after pages were given back
    tokens = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(tiered.generate(IDS, **tokens), resident.generate(IDS, **tokens))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_tiers_on_cuda_are_in_pinned_memory_and_change_no_logit(tiny, tmp_path, form):
    folder = saved(tiny, tmp_path / "m", form=form)
    resident, tiered = (checkpoint.load_model(str(folder), device="cuda", n_hot=n_hot) for n_hot in (None, 0.25))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(tiered(IDS.cuda()).logits, resident(IDS.cuda()).logits)
    parts = [part for part in tiered.modules() if isinstance(part, Tiered)]
    assert all(table.values.is_pinned() for part in parts for table in part.tables.values())


def test_tiers_of_bfloat16_weights_compute_in_the_asked_type(tiny, tmp_path):
    folder = saved(tiny, tmp_path / "m", dtype=torch.bfloat16)
    for dtype in ("float32", "bfloat16"):
        resident = checkpoint.load_model(str(folder), dtype=dtype)
        assert torch.equal(logits(checkpoint.load_model(str(folder), dtype=dtype, n_hot=0.25)), logits(resident))


@pytest.mark.parametrize("form", FORMS)
def test_a_tiered_model_saves_as_the_resident_one(tiny, tmp_path, form):
    folder = saved(tiny, tmp_path / "m", form=form)
    checkpoint.load_model(str(folder), n_hot=0.25).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(checkpoint.load_model(str(folder))))


def test_cold_primitives_hold_no_memory_of_the_process(tiny, tmp_path):
    model = checkpoint.load_model(str(saved(tiny, tmp_path / "m")), n_hot=0.25)
    held = {name: p.shape for name, p in model.named_parameters() if "pilon_banks" in name}
    assert set(held) == {
        f"model.pilon_banks.band{b}.{role}.hot_{leaf}"
        for b in (0, 1)
        for role in ("gate", "up", "down")
        for leaf in "AB"
    }
    assert all(shape[0] == 2 for shape in held.values())
    with pytest.raises(TypeError):
        copy.deepcopy(model)


def test_hot_primitives_are_those_that_layers_use_most(tiny, tmp_path):
    model = checkpoint.load_model(str(saved(tiny, tmp_path / "m")), n_hot=0.25)
    down = [layer for name, layer in projections(model) if name.endswith("down_proj")]
    bank = down[0].bank
    energy = sum(layer.spread().square().sum(1) for layer in down if layer.bank is bank)
    assert set(bank.hot.tolist()) == set(energy.topk(2).indices.tolist())


def test_selections_that_are_made_anew_for_every_call_are_not_remembered(tiny, tmp_path):
    model = tiny.tiny_model("llama")
    sites = find_sites(model)
    banks = {site.role: BankSpec(site.d_in, site.d_out, 8, 4) for site in sites}
    users = {site.name: ProjectionSpec(site.role, 5, site.bias, "softmax") for site in sites}
    install(model, Layout(banks, users))
    initialise(model, 0.3, torch.Generator().manual_seed(1))
    save_model(model, tiny.tiny_tokenizer(), tmp_path / "m", torch.float32)
    tiered = checkpoint.load_model(str(tmp_path / "m"), n_hot=0.25)
    for _ in range(5):
        assert torch.equal(logits(tiered), logits(model))
    assert all(len(part.__dict__["places"]) <= 1 for part in tiered.modules() if isinstance(part, Tiered))


def test_models_that_have_nothing_to_put_in_tiers_are_refused(tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    with pytest.raises(BadInput, match="is dense"):
        checkpoint.load_model(str(tmp_path / "dense"), n_hot=0.25)
    folder = saved(tiny, tmp_path / "m")
    with pytest.raises(BadInput, match="leaves nothing cold"):
        checkpoint.load_model(str(folder), n_hot=0.99)


MEASURED = """
import sys
import torch
from pilon_compress.models import checkpoint

def most():  # megabytes that the process ever had in memory, pages of files included
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

folder, n_hot = sys.argv[1], None if sys.argv[2] == "all" else float(sys.argv[2])
checkpoint.load_model(sys.argv[3])  # whatever loading imports is there now
before = most()
model = checkpoint.load_model(folder, n_hot=n_hot)
with torch.no_grad():
    print(most() - before, float(model(torch.arange(6, 15)[None]).logits.double().sum()), most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peak_memory_falls_with_the_share_of_hot_primitives(tiny, tmp_path):
    model = tiny.tiny_model("llama", hidden_size=256, intermediate_size=512)
    sites = find_sites(model)
    banks = {f"band{site.layer}.{site.role}": BankSpec(site.d_in, site.d_out, 100, 32) for site in sites}
    users = {site.name: ProjectionSpec(f"band{site.layer}.{site.role}", 10, site.bias) for site in sites}
    install(model, Layout(banks, users))
    initialise(model, 0.02, torch.Generator().manual_seed(0))
    save_model(model, tiny.tiny_tokenizer(), tmp_path / "large", torch.float32)
    megabytes = sum(4 * spec.n_primitives * spec.rank * (spec.d_in + spec.d_out) for spec in banks.values()) / 2**20
    small = saved(tiny, tmp_path / "small")

    def run(n_hot):
        words = [sys.executable, "-c", MEASURED, str(tmp_path / "large"), n_hot, str(small)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    (loaded, logits_, ran), (loaded_in_tiers, in_tiers, ran_in_tiers) = run("all"), run("0.1")
    assert loaded > 0.9 * megabytes and ran > 0.9 * megabytes
    assert loaded_in_tiers < 0.5 * megabytes and ran_in_tiers < 0.7 * megabytes
    assert in_tiers == logits_
