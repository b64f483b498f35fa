"""Compare calibration with float64 brute force: input covariances, and gradients with the exact Fisher matrix."""

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from pilon_compress.convert.calibrate.second_moments import PANEL, SecondMoment, add_gram, gather
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.families import find_sites
from pilon_compress.models.source import Source


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_streaming_equals_float64_brute_force(offset):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    rows = torch.randn(5000, 12, generator=generator, dtype=torch.float64) @ mix + offset
    moment = SecondMoment(12)
    for chunk in rows.float().split([1, 7, 4000, 992]):
        moment.update(chunk)
    exact = torch.cov(rows.T, correction=0)
    assert (moment.covariance() - exact).norm() / exact.norm() < 1e-5
    torch.testing.assert_close(moment.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-4)
    second = rows.T @ rows / len(rows)
    assert (moment.second_moment() - second).norm() / second.norm() < 1e-5


@pytest.mark.parametrize("width", [3, PANEL, 2 * PANEL + 5])
def test_a_gram_matrix_in_panels_is_the_whole_product_and_symmetric_to_the_bit(width):
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    start = rows[:7].T @ rows[:7]
    square = add_gram((start + start.T) / 2, rows)
    exact = rows.double().T @ rows.double() + rows[:7].double().T @ rows[:7].double()
    torch.testing.assert_close(square.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(square, square.T)


def test_calibration_leaves_no_gradients_on_the_weights(tiny):
    model = tiny.tiny_model("gpt2").requires_grad_(True)
    ids, mask = text()
    gather(Source(model), [Batch(ids, mask)], find_sites(model), causal=True)
    assert all(weight.grad is None for weight in model.parameters())


def text(rows=4, length=10, seed=0):
    ids = torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    mask[-1, 2:] = 0
    return ids, mask


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "gpt_neox"])
def test_inputs_are_exactly_the_unpadded_ones(tiny, family):
    model = tiny.tiny_model(family)
    sites = find_sites(model)
    ids, mask = text()
    seen = {site.input: [] for site in sites}
    handles = [
        model.base_model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen[name].append(args[0].detach()[mask.bool()].double())
        )
        for name in seen
    ]
    with torch.no_grad():
        model.base_model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    batches = [Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])]
    moments = gather(Source(model), batches, sites, causal=family != "bert")
    for site in sites:
        rows, moment = torch.cat(seen[site.input]), moments.input(site)
        assert moment.count == len(rows) == int(mask.sum())
        torch.testing.assert_close(moment.covariance(), torch.cov(rows.T, correction=0), rtol=1e-3, atol=1e-6)


def gradients_of(model, sites, scalar):
    """G summed over tokens: outer products of the gradient of `scalar` by each site's output."""
    outputs = {}
    handles = [
        model.base_model.get_submodule(site.name).register_forward_hook(
            lambda _m, _a, out, name=site.name: outputs.__setitem__(name, out)
        )
        for site in sites
    ]
    value = scalar()
    for handle in handles:
        handle.remove()
    found = torch.autograd.grad(value, [outputs[site.name] for site in sites], retain_graph=False)
    return {
        s.name: (g.reshape(-1, s.d_out).T @ g.reshape(-1, s.d_out)).double() for s, g in zip(sites, found, strict=True)
    }


def test_gradients_of_a_language_model_are_its_fisher_information(tiny):
    """Compare drawn labels with all label sequences over a vocabulary of four, weighted by their probability."""
    model = tiny.tiny_model("llama", vocab_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sites = find_sites(model)
    ids = torch.tensor([[1, 3, 2]])
    exact = {site.name: torch.zeros(site.d_out, site.d_out, dtype=torch.float64) for site in sites}
    with torch.no_grad():
        chances = model(input_ids=ids).logits[0].log_softmax(-1)
    for labels in itertools.product(range(4), repeat=3):
        weight = sum(chances[t, y] for t, y in enumerate(labels)).exp().item()
        target = torch.tensor(labels)

        def loss(target=target):
            logits = model(input_ids=ids).logits[0]
            return torch.nn.functional.cross_entropy(logits, target, reduction="sum")

        for name, found in gradients_of(model, sites, loss).items():
            exact[name] += weight * found / 3
    copies = 2000
    many = Batch(ids.expand(copies, 3), torch.ones(copies, 3, dtype=torch.long))
    moments = gather(Source(model), [many], sites, causal=True)
    for site in sites:
        error = (moments.gradient(site) - exact[site.name]).norm() / exact[site.name].norm()
        assert error < 0.12, f"{site.name}: {error:.3f}"  # 2000 draws


def test_gradients_of_an_encoder_are_those_of_its_embedding(tiny):
    model = tiny.tiny_model("bert")
    sites = find_sites(model)
    ids, mask = text(rows=2, length=6)
    kept = mask[..., None].float()

    def direction(row, index):
        states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return normalize((states * kept).sum(1) / kept.sum(1), dim=1)[row, index]

    exact = {site.name: torch.zeros(site.d_out, site.d_out, dtype=torch.float64) for site in sites}
    for row, index in itertools.product(range(2), range(32)):
        for name, found in gradients_of(model, sites, lambda r=row, i=index: direction(r, i)).items():
            exact[name] += found / mask.sum()
    copies = 1500
    many = Batch(ids.repeat(copies, 1), mask.repeat(copies, 1))
    moments = gather(Source(model), [many], sites, causal=False)
    for site in sites:
        error = (moments.gradient(site) - exact[site.name]).norm() / exact[site.name].norm()
        assert error < 0.12, f"{site.name}: {error:.3f}"


def test_a_store_on_disk_changes_nothing(tiny, tmp_path):
    model = tiny.tiny_model("gpt2")
    sites = find_sites(model)
    batches = [Batch(*text(seed=1)), Batch(*text(seed=2))]
    held = gather(Source(model), batches, sites, causal=True)
    stored = gather(Source(model), batches, sites, causal=True, store=TensorStore(tmp_path / "store", limit=0))
    assert any((tmp_path / "store").iterdir())
    for site in sites:
        assert torch.equal(held.input(site).scatter, stored.input(site).scatter)
        assert torch.equal(held.gradient(site), stored.gradient(site))


def test_nan_activation_is_refused(tiny):
    model = tiny.tiny_model("bert")
    with torch.no_grad():
        model.base_model.encoder.layer[1].attention.self.query.weight.mul_(1e38)
        model.base_model.encoder.layer[1].attention.self.key.weight.mul_(1e38)
    ids = torch.full((2, 5), 7)
    with pytest.raises(BadInput, match="NaN"):
        gather(Source(model), [Batch(ids, torch.ones_like(ids))], find_sites(model), causal=False)
