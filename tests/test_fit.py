"""Factorisation and joint fit: optimal where theory says so, exact where the data is, never worse than private SVD."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilon_compress.convert.plan import BankPlan
from pilon_compress.convert.sharing.grouping import group
from pilon_compress.convert.sharing.joint_fit import fit_bank
from pilon_compress.convert.sharing.objective import Band, Point
from pilon_compress.convert.solve.bank_fit import CANCELLATION, Factors, losses
from pilon_compress.convert.solve.low_rank import Target, balance_factors
from pilon_compress.models.families import Site


def make_targets(layers, d_in, d_out, seed=0, kind="random", shared=0.0, two_sided=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = draw(d_in, d_out)
    targets = []
    for layer in range(layers):
        W = (1 - shared) * draw(d_in, d_out) + shared * common
        X = draw(4 * d_in, d_in) * torch.logspace(0, -2, d_in, dtype=torch.float64)
        if kind == "zero layer" and layer == 0:
            W = torch.zeros_like(W)
        if kind == "dead inputs":
            X[:, d_in // 2 :] = 0
        if kind == "huge layer" and layer == 0:
            W, X = W * 1e3, X * 1e2
        if kind == "same layers" and layer:
            targets.append(Target(f"layer{layer}", layer, targets[0].weight, targets[0].metric, targets[0].gradient))
            continue
        if kind == "rank one":
            W = torch.outer(W[:, 0], W[0])
        Y = draw(4 * d_out, d_out) * torch.logspace(0, -1, d_out, dtype=torch.float64)
        gradient = Y.T @ Y / len(Y) if two_sided else None
        targets.append(Target.of(f"layer{layer}", layer, W, X.T @ X / len(X), gradient))
    return targets


def make_plan(targets, n, r, k, composition="component"):
    d_in, d_out = targets[0].weight.shape
    sites = tuple(Site(t.name, t.layer, "up", d_in, d_out, False, t.name) for t in targets)
    return BankPlan(0, "up", sites, n, r, k, composition)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_whitened_svd_is_the_optimum_of_the_metric(shape):
    target = make_targets(1, *shape)[0]
    values, vectors = torch.linalg.eigh(target.metric)
    R = vectors * values.sqrt() @ vectors.T
    U, S, Vh = torch.linalg.svd(R @ target.weight, full_matrices=False)
    for rank in (1, 5, 12):
        best = torch.linalg.solve(R, (U[:, :rank] * S[:rank]) @ Vh[:rank])
        dropped = S[rank:].square().sum().item()
        assert target.loss(best) == pytest.approx(dropped, rel=1e-6, abs=1e-9)
        assert target.loss(target.truncated("whitened-svd", rank)) == pytest.approx(dropped, rel=1e-6, abs=1e-9)
    assert target.whitened[1].tolist() == pytest.approx(S.square().tolist(), rel=1e-6)


def test_plain_svd_is_the_optimum_of_the_weight_and_loses_in_the_metric():
    target = make_targets(1, 16, 24)[0]
    U, S, Vh = torch.linalg.svd(target.weight, full_matrices=False)
    torch.testing.assert_close(target.truncated("svd", 4), (U[:, :4] * S[:4]) @ Vh[:4])
    assert target.loss(target.truncated("svd", 4)) > 1.2 * target.loss(target.truncated("whitened-svd", 4))


def test_singular_metric_needs_no_special_case():
    target = make_targets(1, 16, 10, kind="dead inputs")[0]
    assert target.output_loss(target.truncated("whitened-svd", 10)) < 1e-12
    zero = Target.of("z", 0, target.weight, torch.zeros(16, 16, dtype=torch.float64))
    torch.testing.assert_close(zero.truncated("whitened-svd", 3), zero.truncated("svd", 3))


def test_balance_keeps_the_product():
    A, B = torch.randn(6, 3), torch.randn(3, 5) * 100
    A[:, 1] = 0
    a, b = balance_factors(A, B)
    torch.testing.assert_close(a @ b, A @ B)
    torch.testing.assert_close(a.norm(dim=0)[[0, 2]], b.norm(dim=1)[[0, 2]])


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_two_sided_factors_are_the_optimum_of_both_metrics(shape):
    target = make_targets(1, *shape, two_sided=True)[0]
    assert target.gradient is not None
    roots = []
    for metric in (target.metric, target.gradient):
        values, vectors = torch.linalg.eigh(metric)
        roots.append(vectors * values.sqrt() @ vectors.T)
    S = torch.linalg.svdvals(roots[0] @ target.weight @ roots[1])
    for rank in (1, 5, 12):
        dropped = S[rank:].square().sum().item()
        assert target.loss(target.truncated("pilon", rank)) == pytest.approx(dropped, rel=1e-6, abs=1e-9)
    assert target.two_sided[2].tolist() == pytest.approx(S.square().tolist(), rel=1e-6)
    assert target.loss(target.truncated("pilon", 4)) < target.loss(target.truncated("whitened-svd", 4))


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(1, 4),
    shape=st.sampled_from([(8, 12), (12, 8), (9, 9)]),
    n=st.integers(1, 9),
    r=st.integers(1, 3),
    k=st.integers(1, 9),
    composition=st.sampled_from(["component", "scalar"]),
    kind=st.sampled_from(["random", "zero layer", "dead inputs", "huge layer", "rank one", "same layers"]),
    seed=st.integers(0, 3),
    two_sided=st.booleans(),
)
def test_never_worse_than_private_factors(layers, shape, n, r, k, composition, kind, seed, two_sided):
    targets = make_targets(layers, *shape, seed=seed, kind=kind, two_sided=two_sided)
    k = min(max(k, -(-n // layers)), n)  # a layer may at least select what it owns
    fitted = fit_bank(targets, make_plan(targets, n, r, k, composition), seed=seed, sweeps=6)
    owned = [n // layers + (i < n % layers) for i in range(layers)]
    private = [t.loss(t.truncated("pilon", c * r)) for t, c in zip(targets, owned, strict=True)]
    scale = sum(t.total for t in targets)
    assert sum(fitted.losses) <= sum(private) + 1e-9 * scale
    for index, target in enumerate(targets):
        actual = target.loss(fitted.approximation(index))
        assert actual == pytest.approx(fitted.losses[index], rel=1e-6, abs=1e-9 * max(scale, 1e-12))
        assert len(fitted.selected[index].unique()) == k


@pytest.mark.parametrize("composition", ["component", "scalar"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_sharing_earns_its_place_where_layers_have_something_in_common(composition, two_sided):
    targets = make_targets(3, 24, 24, shared=0.7, two_sided=two_sided)
    fitted = fit_bank(targets, make_plan(targets, 9, 2, 9, composition))
    assert sum(fitted.losses) < 0.6 * sum(fitted.private_losses)


def test_some_shared_primitives_gain_much_of_what_sharing_all_does():
    targets = make_targets(3, 24, 24, shared=0.7)
    all_of_them, some = (fit_bank(targets, make_plan(targets, 12, 2, k)) for k in (12, 6))
    assert sum(some.losses) < 0.75 * sum(some.private_losses)
    assert sum(all_of_them.losses) < sum(some.losses)


def test_layers_that_may_use_no_more_than_their_own_primitives_keep_the_optimum():
    """At no more MACs per layer than private factors of that rank, nothing is better than those."""
    targets = make_targets(3, 12, 20, shared=0.7, two_sided=True)
    fitted = fit_bank(targets, make_plan(targets, 9, 2, 3))
    for loss, target in zip(fitted.losses, targets, strict=True):
        assert loss == pytest.approx(target.two_sided[2][6:].sum().item(), rel=1e-6)
    assert sorted(fitted.selected.flatten().tolist()) == list(range(9))


@pytest.mark.parametrize("composition", ["component", "scalar"])
def test_gradient_is_that_of_the_loss(composition):
    targets = make_targets(3, 7, 9, two_sided=True)
    plan = make_plan(targets, 4, 2, 4, composition)
    band = Band(targets, plan)
    for metrics in (band.C, band.G, band.T):
        metrics[:] = [metric.double() for metric in metrics]
    active = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 1]], dtype=torch.bool).repeat_interleave(2, dim=1)
    generator = torch.Generator().manual_seed(0)
    x, step = (torch.randn(16, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    rise = (Point(band, x + 1e-5 * step, active).loss - Point(band, x - 1e-5 * step, active).loss) / 2e-5
    point = Point(band, x, active)
    assert float((point.gradient * step).sum()) == pytest.approx(rise, rel=1e-5)
    A, B = band.original(x[:7], x[7:].T)
    g = torch.zeros(3, 8, dtype=torch.float64)
    for row, used, (weight, *_) in zip(g, point.used, point.parts, strict=True):
        row[used] = weight
    powers = (
        ((A.T @ t.metric) * A.T).sum(1) * ((B @ t.gradient) * B).sum(1) * row**2
        for t, row in zip(targets, g, strict=True)
    )
    penalty = CANCELLATION * float(sum(one.sum() for one in powers))
    loss = band.scale * (sum(losses(targets, Factors(A, B, g, active))) + penalty)
    assert point.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("composition", ["component", "scalar"])
def test_full_rank_plan_is_exact(composition):
    targets = make_targets(2, 8, 12)
    fitted = fit_bank(targets, make_plan(targets, 4, 4, 2, composition))
    for index, target in enumerate(targets):
        error = (fitted.approximation(index) - target.weight).norm() / target.weight.norm()
        assert error < 1e-5


def test_low_rank_weights_are_recovered_exactly():
    """A model that is representable converts without loss: each layer's weight has the rank that it gets."""
    targets = make_targets(3, 10, 14, kind="rank one")
    fitted = fit_bank(targets, make_plan(targets, 3, 1, 1))
    for index, target in enumerate(targets):
        assert (fitted.approximation(index) - target.weight).norm() / target.weight.norm() < 1e-5


def test_fit_is_deterministic_for_a_seed():
    targets = make_targets(3, 12, 16)
    plan = make_plan(targets, 6, 2, 4)
    first, second = fit_bank(targets, plan, seed=3), fit_bank(targets, plan, seed=3)
    assert torch.equal(first.A, second.A) and torch.equal(first.weight, second.weight)
    assert torch.equal(first.selected, second.selected)


def test_grouping_puts_components_of_the_same_layers_together():
    usage = torch.zeros(3, 12)
    pattern = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    for index, layer in enumerate(pattern):
        usage[layer, index] = 1 + index
    order = group(usage, rank=4, seed=0)
    for primitive in order.reshape(3, 4):
        assert len({pattern[i] for i in primitive.tolist()}) == 1
        strengths = usage[:, primitive].sum(0).tolist()
        assert strengths == sorted(strengths, reverse=True)
