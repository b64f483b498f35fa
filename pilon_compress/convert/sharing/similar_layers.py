"""Which layers share a bank: those whose weights, in their metrics, read or write the same directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilon_compress.convert.allocate.budget import Sizing
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.convert.solve.low_rank import Target, square_root
from pilon_compress.io.progress import track

SUBSPACE_SHARE = 0.25  # of the directions of the hidden space: a subspace that tells layers apart
LARGEST = 4  # layers of a band


def similar_bands(dense: Dense, sizings: Sequence[Sizing], largest: int = LARGEST) -> list[list[int]]:
    """Bands of up to `largest` layers of the same shapes, by the subspaces of their projections."""
    spaces: dict[int, list[Tensor]] = {}
    shapes: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for sizing in track(sizings, "comparing layers"):
        block = dense.read(sizing.layer)
        spaces[sizing.layer] = [subspace(block.target(site, None)) for site in sizing.sites]
        shape = tuple((site.role, site.d_in, site.d_out) for site in sizing.sites)
        shapes.setdefault(shape, []).append(sizing.layer)
    found = [
        [layers[index] for index in band]
        for layers in shapes.values()
        for band in cluster(distances([spaces[layer] for layer in layers]), largest)
    ]
    return sorted(found)


def subspace(target: Target) -> Tensor:
    """The strongest directions (d, m) of the whitened weight on its narrow side, orthonormal.

    That side is the hidden space, whose directions mean the same in every layer: the input of up and gate, the output
    of down. The inner neurons of different layers have no common order.
    """
    A, B, _ = target.two_sided
    count = max(1, round(SUBSPACE_SHARE * min(target.weight.shape)))
    if A.shape[0] <= B.shape[1]:
        root = square_root(target.metric)[0]
        return root @ A[:, :count]
    if target.gradient is None:
        return B[:count].T
    return square_root(target.gradient)[0] @ B[:count].T


def distances(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """(L, L): one minus the mean squared cosine of the principal angles between layers, averaged over projections."""
    rows = [
        [torch.stack([(a.T @ b).square().sum() / a.shape[1] for a, b in zip(x, y, strict=True)]).mean() for y in layers]
        for x in layers
    ]
    similar = torch.stack([torch.stack(row) for row in rows])
    return (1 - (similar + similar.T) / 2).clamp_min(0).fill_diagonal_(0)


def cluster(apart: Tensor, largest: int = LARGEST) -> list[list[int]]:
    """Bands of 2 to `largest` of the L things that are `apart` (L, L): branches of their average-linkage tree.

    What is left alone joins the nearest band that has room, or another that is alone.
    """
    count = len(apart)
    if count == 1:
        return [[0]]
    from sklearn.cluster import AgglomerativeClustering  # here, because it takes a second

    tree = AgglomerativeClustering(metric="precomputed", linkage="average", distance_threshold=0, n_clusters=None)
    tree.fit(apart.cpu().numpy())
    nodes: list[list[list[int]]] = [[[leaf]] for leaf in range(count)]
    for left, right in tree.children_:
        bands = nodes[left] + nodes[right]
        whole = len(bands) == 2 and sum(map(len, bands)) <= largest
        nodes.append([sorted(bands[0] + bands[1])] if whole else bands)
    bands = sorted(nodes[-1])
    for band in [band for band in bands if len(band) == 1]:
        if len(band) > 1:  # another one has joined it
            continue
        room = [other for other in bands if other is not band and len(other) < largest]
        if room:
            nearest = min(room, key=lambda other: float(apart[band[0], other].mean()))
            nearest.extend(band)
            bands = [other for other in bands if other is not band]
    return sorted(sorted(band) for band in bands)
