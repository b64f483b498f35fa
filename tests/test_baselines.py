"""Compare every baseline with an independent float64 numpy statement of its paper's objective, and check its counts."""

import numpy as np
import pytest
import torch

from pilon_compress.compare.baselines import basis_sharing, equal_budget, nystrom, original_pilon
from pilon_compress.compare.baselines.approximation import approximate
from pilon_compress.compare.baselines.problem import Problem
from pilon_compress.compare.baselines.registry import BASELINES
from pilon_compress.convert.calibrate.second_moments import SecondMoment
from pilon_compress.convert.solve.low_rank import METRIC_DAMPING
from pilon_compress.errors import BadInput
from pilon_compress.models.families import Site
from pilon_compress.nn.formats.registry import grids

HIDDEN, INNER, LAYERS, TOKENS = 16, 40, 4, 300
SIZED = [name for name, baseline in BASELINES.items() if baseline.units is not None]
RATIOS = [0.2, 0.35, 0.6, 0.83, 1.0]


def make_problem(bias=True, gated=False, seed=0):
    """A stack of feed-forward blocks with correlated inputs that are far from centred, and the inputs themselves."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sites, inputs = [], {}
    for layer in range(LAYERS):
        ups = ("gate", "up") if gated else ("up",)
        for role in ups:
            sites.append(Site(f"l{layer}.{role}", layer, role, HIDDEN, INNER, bias, f"l{layer}.{ups[0]}"))
        sites.append(Site(f"l{layer}.down", layer, "down", INNER, HIDDEN, bias, f"l{layer}.down"))
        for name, width in ((f"l{layer}.{ups[0]}", HIDDEN), (f"l{layer}.down", INNER)):
            inputs[name] = normal(TOKENS, width) @ (normal(width, width) * torch.logspace(0, -2, width)) + normal(width)
    moments = {name: SecondMoment(x.shape[1], torch.float64) for name, x in inputs.items()}
    for name, x in inputs.items():
        moments[name].update(x)
    weights = {site.name: normal(site.d_in, site.d_out) for site in sites}
    biases = {site.name: normal(site.d_out) for site in sites if site.bias}
    return Problem(sites, weights, biases, moments), inputs


def metric_of(problem, inputs, site):
    """The metric by its definition: centred where a bias absorbs the mean, and damped."""
    x = inputs[site.input].numpy()
    x = x - x.mean(0) if site.bias else x
    moment = x.T @ x / len(x)
    return moment + METRIC_DAMPING * np.diag(moment).mean() * np.eye(len(moment))


def tail(matrix, rank):
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def dense_numbers(problem):
    return sum(site.d_in * site.d_out + site.d_out * site.bias for site in problem.sites)


@pytest.mark.parametrize("bias", [True, False])
def test_whitened_svd_loses_the_tail_of_the_whitened_spectrum(bias):
    problem, inputs = make_problem(bias)
    found = approximate("whitened-svd", problem, 0.5)
    for site in problem.sites:
        weight, approximation = problem.weights[site.name].numpy(), found.weights[site.name].numpy()
        metric = metric_of(problem, inputs, site)
        rank = np.linalg.matrix_rank(approximation, tol=1e-8)
        error = weight - approximation
        least = tail(np.linalg.cholesky(metric).T @ weight, rank)
        assert np.trace(error.T @ metric @ error) == pytest.approx(least, rel=1e-8)
        assert found.losses[site.name] == pytest.approx(least / np.trace(weight.T @ metric @ weight), rel=1e-8)


def test_plain_svd_loses_the_tail_of_the_spectrum():
    problem, _ = make_problem()
    found = approximate("svd", problem, 0.5)
    for name, weight in problem.weights.items():
        rank = np.linalg.matrix_rank(found.weights[name].numpy(), tol=1e-8)
        assert float((weight - found.weights[name]).square().sum()) == pytest.approx(tail(weight.numpy(), rank))


def test_asvd_is_the_best_approximation_of_the_scaled_weight():
    problem, inputs = make_problem()
    found = approximate("asvd", problem, 0.5)
    for site in problem.sites:
        weight, approximation = problem.weights[site.name].numpy(), found.weights[site.name].numpy()
        scale = np.diag(metric_of(problem, inputs, site)) ** 0.25  # the root of the root mean square
        rank = np.linalg.matrix_rank(approximation, tol=1e-8)
        lost = float(((scale[:, None] * (weight - approximation)) ** 2).sum())
        assert lost == pytest.approx(tail(scale[:, None] * weight, rank), rel=1e-8)


def test_a_shared_basis_is_optimal_where_the_layers_see_the_same_inputs():
    problem, inputs = make_problem()
    same = {site.input: "l0.up" for site in problem.sites if site.role == "up"}
    moments = {name: problem.moments[same.get(name, name)] for name in problem.moments}
    problem = Problem(problem.sites, problem.weights, problem.biases, moments)
    found = approximate("basis-sharing", problem, 0.5)
    metric = metric_of(problem, inputs, problem.sites[0])
    for first, second in (("l0.up", "l1.up"), ("l2.up", "l3.up")):
        dense, ours = (np.hstack([w[first].numpy(), w[second].numpy()]) for w in (problem.weights, found.weights))
        rank = np.linalg.matrix_rank(ours, tol=1e-8)
        lost = np.trace((dense - ours).T @ metric @ (dense - ours))
        assert lost == pytest.approx(tail(np.linalg.cholesky(metric).T @ dense, rank), rel=1e-6)
        assert np.linalg.matrix_rank(ours[:, :INNER], tol=1e-8) == rank, "the basis is one for both layers"


def test_coefficients_of_a_shared_basis_suit_each_layer():
    """No change of a layer's coefficients lowers that layer's own loss: the error is orthogonal to the basis."""
    problem, inputs = make_problem()
    [(unit, rank), *_] = [
        share for share in BASELINES["basis-sharing"].shares(problem.sites, 0.5) if len(share[0].sites) == 2
    ]
    basis = basis_sharing.shared_basis([problem.targets[site.name] for site in unit.sites], rank)
    found = approximate("basis-sharing", problem, 0.5)
    for site in unit.sites:
        error = problem.weights[site.name] - found.weights[site.name]
        metric = torch.from_numpy(metric_of(problem, inputs, site))
        reach = (basis.norm() * metric.norm() * problem.weights[site.name].norm()).item()
        assert float((basis.T @ metric @ error).abs().max()) < 1e-10 * reach
        assert float(error.norm()) > 1e-3, "and there is an error"


@pytest.mark.parametrize("method", ["svd", "asvd", "whitened-svd", "basis-sharing", "nystrom"])
@pytest.mark.parametrize("gated", [True, False])
def test_everything_kept_is_exact(method, gated):
    problem, _ = make_problem(gated=gated)
    found = approximate(method, problem, 4.0)
    for name, weight in problem.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-7, atol=1e-7)
    assert max(found.losses.values()) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_nystrom_refits_down_by_least_squares(bias):
    problem, inputs = make_problem(bias)
    found = approximate("nystrom", problem, 0.5)
    for layer in range(LAYERS):
        up, down = found.weights[f"l{layer}.up"].numpy(), found.weights[f"l{layer}.down"].numpy()
        kept = np.flatnonzero(np.abs(down).sum(1))
        assert 0 < len(kept) < INNER and set(np.flatnonzero(np.abs(up).sum(0))) == set(kept)
        assert np.array_equal(up[:, kept], problem.weights[f"l{layer}.up"].numpy()[:, kept])
        h = inputs[f"l{layer}.down"].numpy()
        h = h - h.mean(0) if bias else h
        damping = np.sqrt(METRIC_DAMPING * (h**2).mean() * TOKENS)  # the metric's damping, as rows of data
        h = np.vstack([h, damping * np.eye(INNER)])
        wanted = np.linalg.lstsq(h[:, kept], h @ problem.weights[f"l{layer}.down"].numpy(), rcond=None)[0]
        np.testing.assert_allclose(down[kept], wanted, rtol=1e-6, atol=1e-8)


def test_nystrom_selects_by_ridge_leverage():
    problem, inputs = make_problem()
    metric = metric_of(problem, inputs, problem.sites[1])
    ridge = nystrom.RIDGE * np.diag(metric).mean()
    leverage = np.diag(metric @ np.linalg.inv(metric + ridge * np.eye(INNER)))
    chosen = nystrom.select(torch.from_numpy(metric), 7)
    assert chosen.tolist() == sorted(np.argsort(-leverage)[:7].tolist())


def test_dropped_neurons_change_nothing_but_down():
    """The block with whole rows and columns cut away computes what the installed weights of full shape compute."""
    problem, inputs = make_problem(gated=True)
    found = approximate("nystrom", problem, 0.4)
    x = inputs["l0.gate"]
    kept = found.weights["l0.down"].abs().sum(1).nonzero()[:, 0]

    def block(part):
        gate, up = (x @ found.weights[f"l0.{r}"][:, part] + found.biases[f"l0.{r}"][part] for r in ("gate", "up"))
        return torch.nn.functional.silu(gate) * up @ found.weights["l0.down"][part]

    torch.testing.assert_close(block(kept), block(torch.arange(INNER)))


def test_nystrom_keeps_both_halves_of_a_fused_projection():
    sites = [Site("a", 0, "gate_up", HIDDEN, 2 * INNER, False, "a"), Site("b", 0, "down", INNER, HIDDEN, False, "b")]
    plain, _ = make_problem(bias=False)
    weights = {"a": torch.ones(HIDDEN, 2 * INNER, dtype=torch.float64), "b": plain.weights["l0.down"]}
    problem = Problem(sites, weights, {}, {"a": plain.moments["l0.up"], "b": plain.moments["l0.down"]})
    found = approximate("nystrom", problem, 0.5)
    gate, up = found.weights["a"].split(INNER, 1)
    assert torch.equal(gate, up) and 0 < int(gate[0].sum()) < INNER
    assert found.stored == int(gate[0].sum()) * (2 * HIDDEN + HIDDEN)


@pytest.mark.parametrize("top_k", [2, 5, 9])
def test_a_simplex_fit_is_the_best_mixture_of_its_primitives(top_k):
    rng = np.random.default_rng(top_k)
    primitives = rng.normal(size=(9, 60)) + 0.5
    wanted = 0.4 * primitives[3] + 0.3 * primitives[7] - 0.2 * primitives[1] + rng.normal(size=60)
    gram, right = primitives @ primitives.T, primitives @ wanted
    w = original_pilon.simplex_fit(torch.from_numpy(gram), torch.from_numpy(right), top_k).numpy()
    assert w.min() >= 0 and w.sum() == pytest.approx(1) and (w > 0).sum() <= top_k
    support = np.flatnonzero(w)
    lost = ((wanted - w @ primitives) ** 2).sum()
    for other in rng.dirichlet(np.full(len(support), 0.5), size=3000):
        assert lost <= ((wanted - other @ primitives[support]) ** 2).sum() + 1e-9
    if top_k == 9:  # the conditions of an optimum over the simplex
        slope = gram @ w - right
        assert slope[support].max() - slope[support].min() < 1e-6 and slope.min() > slope[support].min() - 1e-6


def test_the_original_mixes_windows_of_the_mean_weight():
    problem, _ = make_problem()
    found = approximate("original-pilon", problem, 0.35)
    mean = torch.stack([problem.weights[f"l{layer}.up"] for layer in range(3)]).mean(0)
    U, _, Vh = torch.linalg.svd(mean, full_matrices=False)
    for layer in range(3):
        seen = U.T @ found.weights[f"l{layer}.up"] @ Vh.T
        assert float((seen - seen.diag().diag()).abs().max()) < 1e-9, "only singular directions of the mean"
    rank = max(1, min(original_pilon.WIDEST, HIDDEN // 8))
    [(_, count), *_] = BASELINES["original-pilon"].shares(problem.sites, 0.35)
    selected = -(-count // original_pilon.SELECTED)
    assert np.linalg.matrix_rank(found.weights["l0.up"].numpy(), tol=1e-9) <= selected * rank


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("bias", "gated"), [(True, False), (False, True)])
def test_budgets_are_met_and_counted(method, ratio, bias, gated):
    problem, _ = make_problem(bias, gated)
    asked = BASELINES[method].shares(problem.sites, ratio)
    found = approximate(method, problem, ratio)
    budget = ratio * dense_numbers(problem)
    solution = BASELINES[method].solve(problem, asked)
    biases = sum(b.numel() for name, b in problem.biases.items() if name not in solution.kept)
    biases += sum(len(kept) for name, kept in solution.kept.items() if name in problem.biases)
    assert found.stored == sum(f.numel() for f in solution.factors) + biases
    assert BASELINES[method].planned(problem.sites, ratio) == (found.stored, found.bytes)
    assert found.stored <= budget
    growing = [unit.price for unit, count in asked if count < unit.most]
    assert not growing or budget - found.stored < max(growing), "no whole step is left over"
    assert found.macs <= sum(site.d_in * site.d_out for site in problem.sites)
    assert {name: w.shape for name, w in found.weights.items()} == {n: w.shape for n, w in problem.weights.items()}


def test_stored_numbers_follow_from_the_ranks_of_the_weights():
    problem, _ = make_problem(bias=False)

    def rank(*names):
        return np.linalg.matrix_rank(np.hstack([found.weights[name].numpy() for name in names]), tol=1e-8)

    found = approximate("whitened-svd", problem, 0.5)
    each = [rank(site.name) * (HIDDEN + INNER) for site in problem.sites]
    assert found.stored == found.macs == sum(each)
    found = approximate("basis-sharing", problem, 0.5)
    shared = [rank("l0.up", "l1.up"), rank("l2.up", "l3.up")]
    private = [rank(f"l{layer}.down") for layer in range(LAYERS)]
    assert found.stored == sum(r * (HIDDEN + 2 * INNER) for r in shared) + sum(private) * (HIDDEN + INNER)
    assert found.macs == (2 * sum(shared) + sum(private)) * (HIDDEN + INNER)
    found = approximate("nystrom", problem, 0.5)
    neurons = sum(int((found.weights[f"l{layer}.down"].abs().sum(1) > 0).sum()) for layer in range(LAYERS))
    assert found.stored == found.macs == neurons * 2 * HIDDEN


@pytest.mark.parametrize("method", SIZED)
def test_biases_absorb_the_mean_error_for_every_method(method):
    problem, inputs = make_problem()
    found = approximate(method, problem, 0.4)
    for site in problem.sites:
        x = inputs[site.input]
        dense = x @ problem.weights[site.name] + problem.biases[site.name]
        ours = x @ found.weights[site.name] + found.biases[site.name]
        torch.testing.assert_close(ours.mean(0), dense.mean(0))
        assert float((ours - dense).abs().max()) > 1e-3
    assert approximate(method, make_problem(bias=False)[0], 0.4).biases == {}


@pytest.mark.parametrize("method", SIZED)
def test_a_budget_for_nothing_is_refused(method):
    problem, _ = make_problem()
    with pytest.raises(BadInput, match=f"ratio 0.01 is too small for {method}"):
        BASELINES[method].shares(problem.sites, 0.01)


def test_nystrom_needs_whole_blocks():
    problem, _ = make_problem()
    with pytest.raises(BadInput, match="layer 0 has no pair"):
        nystrom.units([site for site in problem.sites if site.role == "up"])


def test_the_last_unit_is_served_before_another_gets_more():
    sites = [Site(f"l{layer}.up", layer, "up", 8, 8, False, f"l{layer}.up") for layer in range(3)]
    units = [equal_budget.Unit((site,), price, 0, 8) for site, price in zip(sites, (6, 6, 10), strict=True)]
    assert [count for _, count in equal_budget.deal(units, 0.14, "any")] == [1, 1, 1]


@pytest.mark.parametrize("kind", grids())
@pytest.mark.parametrize("bias", [True, False])
def test_error_feedback_beats_rounding_to_the_nearest_in_the_same_bytes(kind, bias):
    problem, inputs = make_problem(bias)
    nearest, fed_back = (approximate(f"{how}-{kind}", problem, 1.0) for how in ("rtn", "gptq"))
    bytes_of = {"int8": 1.0, "int4": 0.5, "int3": 0.375, "int2": 0.25}[kind]
    scales = sum(2 * site.d_out * (1 if kind == "int8" else -(-site.d_in // 64)) for site in problem.sites)
    numbers = sum(weight.numel() for weight in problem.weights.values())
    biases = sum(bias.numel() for bias in problem.biases.values())
    assert BASELINES[f"rtn-{kind}"].planned(problem.sites, 1.0) == (nearest.stored, nearest.bytes)
    assert nearest.bytes == fed_back.bytes == bytes_of * numbers + scales + 2 * biases
    assert nearest.stored == fed_back.stored == numbers + biases == dense_numbers(problem)
    assert sum(fed_back.losses.values()) < 0.9 * sum(nearest.losses.values())
    assert not nearest.biases and set(fed_back.biases) == set(problem.biases)
    for site in problem.sites:
        x, weight = inputs[site.input], problem.weights[site.name]
        error = x @ (fed_back.weights[site.name] - weight)
        if bias:
            error = error + fed_back.biases[site.name] - problem.biases[site.name]
        centred = x - x.mean(0) if bias else x
        lost = error.square().sum() / (centred @ weight).square().sum()
        assert fed_back.losses[site.name] == pytest.approx(float(lost), rel=0.15, abs=1e-7), "to the damping"
        for column in nearest.weights[site.name].T[:4]:
            assert len(column[:64].unique()) <= {"int8": 255, "int4": 16, "int3": 8, "int2": 4}[kind]
