"""The parts that training is made of: hosts within budgets, parameter groups, Muon, schedules."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilon_compress.config.model import FfnConfig, HostConfig
from pilon_compress.config.training_sections import Optimizer, Schedule
from pilon_compress.distill.losses import next_token_sum
from pilon_compress.errors import BadInput
from pilon_compress.models import base_architectures, checkpoint, layouts
from pilon_compress.models.families import find_sites
from pilon_compress.nn.install import install
from pilon_compress.nn.installed import layout_of, projections
from pilon_compress.nn.size import ffn_size
from pilon_compress.optimize import schedule
from pilon_compress.optimize.optimizers import GROUPS, Muon, group_parameters, make_optimizers, orthogonalised, restrict

SMALL = HostConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, vocab_size=64)


HALF = FfnConfig(ffn_ratio=0.6, mac_ratio=0.6)


@cache
def sites(host: HostConfig = SMALL):
    return find_sites(checkpoint.empty_model(base_architectures.config_for(host, 64, 0)))


def built(ffn: FfnConfig = HALF, host: HostConfig = SMALL, seed: int = 0):
    config = base_architectures.config_for(host, 64, 0)
    return base_architectures.build_with(config, layouts.layout_for(sites(host), ffn), seed)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["pilon", "lowrank"]),
    stored=st.floats(0.15, 1),
    macs=st.floats(0.15, 1),
    bands=st.sampled_from([None, 1, 2, 4, [[0, 3], [1, 2]]]),
    composition=st.sampled_from(["component", "scalar", "softmax"]),
    family=st.sampled_from(["arcee", "llama"]),
)
def test_no_plan_is_larger_than_its_budget(kind, stored, macs, bands, composition, family):
    ffn = FfnConfig(kind=kind, ffn_ratio=stored, mac_ratio=macs, bands=bands, composition=composition)
    try:
        layout = layouts.layout_for(sites(SMALL.model_copy(update={"family": family})), ffn)
    except BadInput as refusal:
        assert "the budget pays for no" in str(refusal)
        return
    size = ffn_size(layout).over_dense().dump()
    assert size["stored_ratio"] <= stored and size["mac_ratio"] <= macs


@pytest.mark.parametrize(
    ("given_shape", "told"),
    [
        ({"n_primitives": 16, "rank": 4, "top_k": 8}, "the model stores .* above ffn.ffn_ratio 0.5: lower ffn.rank"),
        (
            {"n_primitives": 2, "rank": 16, "ffn_ratio": 1, "mac_ratio": 0.5},
            "takes 0.667 of the dense .*, above ffn.mac_ratio 0.5",
        ),
    ],
)
def test_a_given_shape_beyond_the_budget_is_refused(given_shape, told):
    with pytest.raises(BadInput, match=told):
        layouts.layout_for(sites(), FfnConfig(bands=2, **given_shape))
    fits = layouts.layout_for(sites(), FfnConfig(bands=2, n_primitives=4, rank=4))
    assert {bank.n_primitives for bank in fits.banks.values()} == {4}


@pytest.mark.parametrize(("width", "inner", "rank"), [(512, 2048, 32), (1024, 4096, 64)])
def test_shapes_of_the_original_suit_the_kernels(width, inner, rank):
    host = SMALL.model_copy(update={"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 8})
    layout = layouts.layout_for(sites(host), FfnConfig(rank=rank))
    for spec in layout.projections.values():
        assert layout.banks[spec.bank].rank % 16 == 0
        assert spec.top_k * layout.banks[spec.bank].rank <= width / 2


def test_wider_blocks_and_plain_matrices_keep_to_the_budget():
    for ffn in (FfnConfig(neurons=1.5), FfnConfig(neurons=0.75), FfnConfig(primitive="neurons")):
        size = ffn_size(layouts.layout_for(sites(), ffn)).over_dense().dump()
        assert 0.4 < size["stored_ratio"] <= 0.5 and 0.4 < size["mac_ratio"] <= 0.5
        model = built(ffn)
        assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_every_primitive_is_used_and_none_by_chance():
    model = built(FfnConfig(ffn_ratio=0.4, mac_ratio=0.6, bands=2))
    used: dict[int, list[int]] = {}
    for _, composed in projections(model):
        used.setdefault(id(composed.bank), [0] * composed.bank.n_primitives)
        for place in composed.selected.tolist():
            used[id(composed.bank)][place] += 1
    for counts in used.values():
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1


def test_twins_begin_with_the_same_weights_outside_the_feed_forward_part():
    dense, pilon = built(FfnConfig(kind="dense")), built()
    theirs = dict(dense.named_parameters())
    shared = [name for name, p in pilon.named_parameters() if name in theirs and "mlp" not in name]
    assert len(shared) > 10
    assert all(torch.equal(theirs[name], dict(pilon.named_parameters())[name]) for name in shared)


def test_the_output_of_a_new_block_varies_as_much_as_the_dense_ones():
    host = SMALL.model_copy(update={"hidden_size": 128, "intermediate_size": 512})
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    spread = {}
    for kind in ("dense", "pilon", "lowrank"):
        up = built(FfnConfig(kind=kind), host).model.layers[1].mlp.up_proj
        spread[kind] = float(up(x).detach().std())
    assert spread["pilon"] == pytest.approx(spread["dense"], rel=0.15)
    assert spread["lowrank"] == pytest.approx(spread["dense"], rel=0.15)


def test_every_parameter_is_in_one_group():
    model = built()
    groups = group_parameters(model)
    grouped = [id(p) for group in groups.values() for p in group.values()]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
    assert set(groups) == set(GROUPS)
    assert all(name.endswith((".A", ".B")) for name in groups["banks"])
    assert len(groups["compositions"]) == 8 and "model.embed_tokens.weight" in groups["embeddings"]
    assert all(p.dim() == 1 for p in groups["vectors"].values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_factors_reach_their_groups_and_norms_do_not_decay(name):
    made = make_optimizers(built(), Optimizer(name=name, banks=0.5, compositions=3, learning_rate=0.1))
    groups = {group["name"]: group for optimizer in made for group in optimizer.param_groups}
    assert groups["compositions"]["base_lr"] == pytest.approx(0.3) and groups["compositions"]["weight_decay"] == 0
    assert groups["banks"]["base_lr"] == pytest.approx(0.05 if name == "adamw" else 0.0025)
    assert groups["vectors"]["weight_decay"] == 0 and groups["matrices"]["weight_decay"] == 0.1


def test_compositions_alone_learn_when_asked():
    model = built()
    restrict(model, "compositions")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(name.endswith("_proj.weight") for name in names)
    restrict(model.requires_grad_(True), "ffn")
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B", "weight"}


def test_muon_takes_matrices_as_torch_does():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    mine = Muon([{"params": [ours], "lr": 0.02, "weight_decay": 0.1}])
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(24, 40)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert (ours - theirs).abs().max() < 2e-3  # it works in bfloat16
    assert (ours - 1).abs().max() > 1e-2


def test_muon_treats_every_primitive_as_a_matrix_of_its_own():
    stack = torch.randn(5, 12, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None, None]
    together = orthogonalised(stack)
    alone = torch.stack([orthogonalised(one) for one in stack])
    assert torch.allclose(together, alone, atol=1e-5)
    values = torch.linalg.svdvals(together)
    assert values.min() > 0.6 and values.max() < 1.3


def test_wsd_warms_up_stays_and_falls():
    asked = Schedule(warmup=0.1, decay=0.2, floor=0.1)
    shares = [0.05, 0.1, 0.5, 0.8, 0.9, 1.0]
    assert [schedule.rate(asked, share) for share in shares] == pytest.approx([0.5, 1, 1, 1, 0.55, 0.1])


def test_cosine_ends_at_its_floor():
    asked = Schedule(kind="cosine", warmup=0.1, floor=0.2)
    assert schedule.rate(asked, 0.55) == pytest.approx(0.6)
    assert schedule.rate(asked, 1.0) == pytest.approx(0.2)
    assert schedule.rate(Schedule(kind="constant", warmup=0), 0.7) == 1
    assert schedule.fade(0.5, 1.0) == pytest.approx(0.5) and schedule.fade(0.5, 0.4) == 0


def test_loss_in_parts_is_the_loss(monkeypatch):
    head = torch.nn.Linear(8, 50, bias=False)
    hidden, labels = torch.randn(30, 8, requires_grad=True), torch.randint(0, 50, (30,))
    labels[::7] = -100
    whole = next_token_sum(head, hidden, labels)
    (gradient,) = torch.autograd.grad(whole, hidden)
    monkeypatch.setattr("pilon_compress.nn.functional.LOGITS", 200)
    parts = next_token_sum(head, hidden, labels)
    assert torch.allclose(whole, parts) and torch.allclose(gradient, torch.autograd.grad(parts, hidden)[0], atol=1e-6)
    expected = -head(hidden).double().log_softmax(-1)[torch.arange(30), labels.clamp_min(0)][labels >= 0].sum()
    assert math.isclose(whole.item(), expected.item(), rel_tol=1e-5)


def test_layout_of_a_new_model_is_its_plan():
    ffn = FfnConfig(composition="softmax")
    layout = layouts.layout_for(sites(), ffn)
    layout = layout.with_addition("original", "latent_scale", layout.banks)
    model = checkpoint.build(base_architectures.config_for(SMALL, 64, 0))
    install(model, layout)
    assert layout_of(model) == layout
