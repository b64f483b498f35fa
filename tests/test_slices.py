"""Experts without training: slices of a dense model's neurons, their router, sizes, files, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pilon_compress as pc
from pilon_compress.config.experts import SlicesConfig
from pilon_compress.convert.experts.clusters import balanced_clusters, first_most_alike, linear_router, slice_neurons
from pilon_compress.convert.experts.plan import plan_slices
from pilon_compress.models.families import find_sites
from pilon_compress.nn.installed import layout_of, neuron_projections, routers
from pilon_compress.nn.size import ffn_size
from pilon_compress.nn.specs import RouterSpec

IDS = torch.randint(6, 200, (2, 9), generator=torch.Generator().manual_seed(3))
TEXTS = [" ".join(f"the primitive number {n * k} of bank {k}" for n in range(40)) for k in range(12)]
BLOCKS = {"llama": "layers.{}.mlp", "phi3": "layers.{}.mlp", "arcee": "layers.{}.mlp", "gpt2": "h.{}.mlp"}


def converted(model, tiny, moe, **config):
    settings = pc.ConvertConfig(moe=moe, calibration={"samples": 12, "sequence_length": 32}, **config)
    return pc.compress(model, tiny.tiny_tokenizer(), settings, TEXTS, evaluation="none")


def down_of(block):
    return next(module for name, module in block.named_modules() if name in ("down_proj", "c_proj"))


def dense_hidden(block, x):
    """The neurons' activations (N, d_ff) of a dense block, by its own forward pass."""
    seen = []
    down = down_of(block)
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = block(x)
    handle.remove()
    return seen[0], output, down


MOES = ["active=0.25", "experts=8,shared=0,top_k=3,router=neurons", "experts=2,shared=2,top_k=1,router=neurons"]


@pytest.mark.parametrize("moe", MOES)
@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_a_block_is_the_sum_of_the_slices_that_its_router_chooses(tiny, family, moe):
    dense = tiny.tiny_model(family).double()
    model = converted(dense, tiny, moe)[0].double()
    x = torch.randn(1, 11, 32, dtype=torch.float64)
    for layer in range(3):
        path = BLOCKS[family].format(layer)
        block, theirs = model.base_model.get_submodule(path), dense.base_model.get_submodule(path)
        hidden, output, down = dense_hidden(theirs, x)
        order = permutation(block, theirs)
        slices = order.view(block.router.recipes, -1)
        scores = hidden[0][:, slices[block.router.shared :, 0]].abs()
        if block.router.kind == "linear":
            scores = x[0] @ block.router.weight.T
        on = torch.zeros(11, block.router.recipes, dtype=torch.bool)
        on[:, : block.router.shared] = True
        on.scatter_(1, block.router.shared + scores.topk(block.router.top_k, 1).indices, True)
        mask = torch.zeros(11, 64, dtype=torch.float64)
        mask[:, slices.flatten()] = on.double().repeat_interleave(slices.shape[1], 1)
        torch.testing.assert_close(block(x), down(hidden * mask), rtol=1e-6, atol=1e-6)


def permutation(block, theirs):
    """The dense block's neuron that each neuron of the bank is."""
    ours = next(layer for layer in block.modules() if getattr(layer, "role", "") == "down").bank.part("down")
    down = down_of(theirs)
    rows = down.weight if type(down).__name__ == "Conv1D" else down.weight.T
    return torch.cdist(ours.double(), rows.double()).argmin(1)


@pytest.mark.parametrize("moe", ["active=1", "experts=4,shared=0,top_k=4"])
@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_with_all_experts_active_logits_are_the_dense_models(tiny, family, moe):
    dense = tiny.tiny_model(family)
    model, _ = converted(dense, tiny, moe)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("router", "matrices"), [("linear", 1), ("neurons", 2)])
@torch.no_grad()
def test_sizes_are_those_of_the_file_and_macs_count_the_router(tiny, tmp_path, router, matrices):
    dense = tiny.tiny_model("llama")
    model, report = converted(dense, tiny, f"active=0.25,router={router}")
    pc.save(model, tmp_path / "m")
    stored = {k: t for k, t in load_file(tmp_path / "m/model.safetensors").items() if ".mlp." in k or "pilon_" in k}
    size = ffn_size(layout_of(model), 4)
    assert size.stored == sum(t.numel() for t in stored.values()) == report.ffn.stored
    assert size.bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert size.macs == 3 * (3 * 32 * 16 + 7 * matrices * 32)  # two of eight slices of 64 neurons, and the router
    assert report.ffn.dense_stored == 3 * 3 * 32 * 64 and report.ffn.mac_ratio == size.macs / report.ffn.dense_macs
    bank = sum(tensor.numel() for key, tensor in stored.items() if "pilon_banks" in key)
    assert bank == report.ffn.dense_stored
    assert len(report.slices) == 3 and all(0 < one.relative_error < 1 for one in report.slices)
    assert all(len(one.load) == 7 and sum(one.load) == pytest.approx(1) for one in report.slices)


def test_clusters_are_balanced_and_follow_groups_of_neurons():
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(24) % 3
    awake = torch.rand(400, 3, generator=generator) < 0.3
    points = (awake[:, group] & (torch.rand(400, 24, generator=generator) < 0.9)).float().T
    found = balanced_clusters(points, 3)
    assert sorted(found.flatten().tolist()) == list(range(24)) and found.shape == (3, 8)
    assert all(len(set(group[members].tolist())) == 1 for members in found)


def test_slices_begin_with_the_neurons_of_most_worth_and_each_expert_with_one_like_it():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(300, 32, generator=generator)
    hidden[:, [3, 9, 20, 31]] *= 50
    slices = slice_neurons(hidden, torch.ones(32), RouterSpec(8, 7, 1, "neurons", 1, gates="ones"))
    assert set(slices[0].tolist()) == {3, 9, 20, 31} and sorted(slices.flatten().tolist()) == list(range(32))
    worth = torch.tensor([[1.0, 9.0, 2.0], [2.0, 1.0, 4.0], [3.0, 1.0, 40.0]])
    assert first_most_alike(worth, torch.tensor([1, 2, 0])).tolist()[0] == 2


def test_a_worthless_norm_does_not_make_a_neuron_shared():
    hidden, norms = torch.ones(50, 16), torch.ones(16)
    hidden[:, 5] = 100.0
    norms[5] = 0.0
    slices = slice_neurons(hidden + torch.rand(50, 16) / 10, norms, RouterSpec(8, 3, 1, "neurons", 1))
    assert 5 not in slices[0]


def test_a_linear_router_finds_the_expert_that_its_input_wakes():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(4000, 8, generator=generator)
    worth = (1 + inputs[:, :4]).clamp_min(0).repeat_interleave(3, 1)  # twelve neurons, of which three follow an input
    weight = linear_router(inputs, worth, torch.arange(12).view(4, 3))
    assert torch.equal(weight.argmax(1), torch.arange(4))
    assert float((inputs.double() @ weight.T).std()) == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_saved_exported_and_loaded_logits_are_equal(tiny, tmp_path, bare, family):
    router = {"llama": "linear", "gpt2": "neurons"}[family]
    model, _ = converted(tiny.tiny_model(family), tiny, f"active=0.5,router={router}")
    pc.save(model, tmp_path / "m")
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(IDS).logits
    torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    pc.export(tmp_path / "m", tmp_path / "alone", to="self-contained")
    torch.save((IDS, logits), tmp_path / "expected.pt")
    bare.python(
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"ids, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'alone')!r}, trust_remote_code=True)\n"
        "torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)"
    )


@torch.no_grad()
def test_a_token_is_computed_alone_and_in_decoding_as_in_reading(tiny):
    model, _ = converted(tiny.tiny_model("llama"), tiny, "active=0.25")
    whole = model(IDS).logits
    torch.testing.assert_close(model(IDS[:1]).logits, whole[:1], rtol=1e-4, atol=1e-4)
    cache = model(IDS[:, :-1], use_cache=True).past_key_values
    torch.testing.assert_close(
        model(IDS[:, -1:], past_key_values=cache).logits[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4
    )


def test_learning_reaches_the_neurons_that_are_chosen(tiny):
    model, _ = converted(tiny.tiny_model("llama"), tiny, "active=0.25")
    model.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    for _, layer in neuron_projections(model):
        gradient = layer.bank.get_parameter(f"{layer.role}.weight").grad
        assert gradient is not None and bool(gradient.any()) and bool(gradient.isfinite().all())
    assert all(bool(router.weight.grad.any()) for _, router in routers(model))


def test_settings_are_shares_of_eight_slices_or_numbers(tiny):
    assert SlicesConfig().shape == (6, 2, 2) and SlicesConfig(active=0.25).shape == (7, 1, 1)
    assert SlicesConfig(active=0.125).shape == (8, 0, 1) and SlicesConfig(active=1).shape == (4, 4, 4)
    assert SlicesConfig(experts=14, shared=2, top_k=2).share == 0.25


REFUSED = [
    ("active=0.3", (), "no number of 8 slices"),
    ("active=0.5,router=mlp", (), "must be 'linear' or 'neurons'"),
    ("experts=7", (), "needs experts, shared and top_k together"),
    ("experts=3,shared=1,top_k=4", (), "more than its 3 experts"),
    ("active=0.5,experts=7,shared=1,top_k=1", (), "0.25 by its other numbers"),
    ("experts=10,shared=1,top_k=1", (), "do not divide into 11 slices"),
    ("active=0.25", ("--ffn-ratio", "0.5"), "drops nothing"),
    ("active=0.25", ("--bank-dtype", "int4"), "no effect with --moe"),
    ("active=0.25", ("--elastic",), "no effect with --moe"),
    ("active=0.25", ("--method", "svd"), "no effect with --moe"),
    ("active=0.25", ("--share", "auto"), "no effect with --moe"),
    ("active=0.25", ("--refine", "3"), "no effect with --moe"),
    ("active=0.25", ("--mac-ratio", "0.5"), "no effect with --moe"),
    ("active=0.25", ("--whole-matrices",), "no effect with --moe"),
    ("active=0.25", ("--targets", "all"), "feed-forward blocks alone"),
    ("active=0.25", ("--ignore", "re:.*layers.0.mlp.up_proj"), "in part"),
]


@pytest.mark.parametrize(("moe", "more", "words"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_in_a_line(cli, tiny, tmp_path, moe, more, words):
    tiny.save_tiny("llama", tmp_path / "dense")
    done = cli("convert", "dense", "-o", "out", "--moe", moe, *more, cwd=tmp_path, code=2)
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_blocks_beside_other_modules_are_refused(tiny):
    with pytest.raises(pc.BadInput, match="need a module for each"):
        plan_slices(find_sites(tiny.tiny_model("opt")), SlicesConfig())


def test_a_folder_is_planned_made_streamed_and_healed(cli, tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 4))
    words = ("convert", "dense", "--moe", "active=0.25", "--calibration", "text.txt", "--samples", "8")
    words += ("--sequence-length", "64", "--eval-data", "none", "--json")
    planned = json.loads(cli(*words, "-o", "out", "--dry-run", cwd=tmp_path).stdout)
    made = json.loads(cli(*words, "-o", "out", cwd=tmp_path).stdout)
    assert planned["final"] and planned["ffn"] == {key: made["ffn"][key] for key in planned["ffn"]}
    assert "in slices of equal size, of which 2 of 8" in (tmp_path / "out/README.md").read_text()
    assert "<h2>Experts</h2>" in (tmp_path / "out/report.html").read_text()
    cli(*words, "-o", "streamed", "--max-memory", "0.0003", cwd=tmp_path)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "streamed"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-4)
    heal = ("train", "--heal", "out", "-o", "healed", "--data", "text.txt", "--sequence-length", "64")
    heal += ("--tokens", "1024", "--set", "distill.keep_best=false")
    healed = json.loads(cli(*heal, "--batch-size", "4", "--json", cwd=tmp_path).stdout)
    assert healed["ffn"]["mac_ratio"] == made["ffn"]["mac_ratio"] and len(healed["routing"]["load"]) == 3
    after = load_file(tmp_path / "healed/model.safetensors")
    assert not torch.equal(after["model.layers.0.mlp.router.weight"], ours["model.layers.0.mlp.router.weight"])
