"""Layers that are made of the same directions are found, wherever they stand."""

import pytest
import torch

from pilon_compress.convert.sharing.similar_layers import cluster, distances, subspace
from pilon_compress.convert.solve.low_rank import Target


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_pairs_of_a_common_subspace_are_found_shuffled(shape, two_sided):
    """Pairs agree in the hidden space alone, the other side being different, and every layer in a metric of its own."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(8, generator=generator).tolist()
    common = [torch.linalg.qr(draw(generator, 16, 4))[0] for _ in range(4)]
    layers: dict[int, list[torch.Tensor]] = {}
    for place, layer in enumerate(order):
        hidden, other = common[place // 2], draw(generator, 4, 40)
        W = hidden @ other + 0.05 * draw(generator, 16, 40)
        W = W if shape[0] == 16 else W.T
        X, Y = draw(generator, 8 * shape[0], shape[0]), draw(generator, 8 * shape[1], shape[1])
        gradient = Y.T @ Y / len(Y) if two_sided else None
        layers[layer] = [subspace(Target.of(f"{layer}", layer, W, X.T @ X / len(X), gradient))]
        torch.testing.assert_close(layers[layer][0].T @ layers[layer][0], torch.eye(4, dtype=torch.float64))
    apart = distances([layers[layer] for layer in range(8)])
    assert cluster(apart, 2) == sorted(sorted(order[i : i + 2]) for i in range(0, 8, 2))
    assert apart.diagonal().abs().max() == 0 and torch.equal(apart, apart.T)


def test_bands_are_neither_alone_nor_too_large():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        count = 2 + seed % 11
        points = torch.randn(count, 2, generator=generator)
        bands = cluster(torch.cdist(points, points), 4)
        assert sorted(index for band in bands for index in band) == list(range(count))
        assert max(map(len, bands)) <= 4
        alone = sum(len(band) == 1 for band in bands)
        assert alone == 0 or all(len(band) == 4 for band in bands if len(band) > 1) and alone == 1
    assert cluster(torch.zeros(1, 1)) == [[0]]
