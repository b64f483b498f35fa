"""Elimination of neurons: its costs are true, its choices good, and what the others can replace is free."""

import pytest
import torch

from pilon_compress.convert.solve.neuron_pruning import eliminate, refit


def problem(neurons=40, d_out=12, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    C = (lambda X: X.T @ X / len(X))(draw(3 * neurons, neurons) * torch.logspace(0, -1, neurons, dtype=torch.float64))
    G = (lambda Y: Y.T @ Y / len(Y))(draw(3 * d_out, d_out))
    return draw(neurons, d_out), C + 1e-3 * torch.eye(neurons), G


def loss(W, C, G, left):
    """Compute the loss of the least-squares refit with the neurons `left` from scratch."""
    error = W - torch.zeros_like(W).index_copy(0, left, refit(W, C, left))
    return float(((C @ error @ G) * error).sum())


@pytest.mark.parametrize("count", [39, 25, 10, 1])
def test_the_predicted_loss_is_that_of_the_refit(count):
    W, C, G = problem()
    found = eliminate(W, C, G)
    assert sorted(found.order.tolist()) == list(range(40))
    assert found.loss(count) == pytest.approx(loss(W, C, G, found.left(count)), rel=1e-8)


def test_it_chooses_better_than_chance_and_than_size_alone():
    W, C, G = problem()
    left = eliminate(W, C, G).left(15)
    by_power = C.diagonal().topk(15).indices
    torch.manual_seed(0)
    random = [loss(W, C, G, torch.randperm(40)[:15]) for _ in range(50)]
    assert loss(W, C, G, left) < loss(W, C, G, by_power)
    assert loss(W, C, G, left) < min(random)


def test_a_neuron_that_others_can_replace_goes_first_and_costs_nothing():
    W, C, G = problem()
    mix = torch.eye(41, 40, dtype=torch.float64)
    mix[40, :3] = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    C = mix @ C @ mix.T + 1e-9 * torch.eye(41)
    found = eliminate(torch.cat([W, W[:1]]), C, G)
    assert found.order[0].item() in (0, 1, 2, 40)
    assert found.loss(40) < 1e-6 * found.loss(20)


def test_loss_grows_as_neurons_go():
    found = eliminate(*problem(seed=1))
    assert bool((found.cost.diff() >= 0).all()) and found.loss(40) == 0.0
