"""Group components into primitives: those that the layers use together, with similar strength."""

import numpy as np
import torch
from torch import Tensor

MAX_PATTERNS = 16


def group(usage: Tensor, rank: int, seed: int) -> Tensor:
    """Order (K,) that puts the K components of a bank into primitives of `rank`: the first `rank` are primitive 0.

    `usage` (L, K): the power that each component brings to each layer's output, in units of that layer's dense
    output, so components of different layers compare. KMeans finds the patterns of layers that use a component; a
    pattern's components go together, strongest first, so that a layer which selects whole primitives leaves little
    unused.
    """
    layers, count = usage.shape
    power = usage.sum(0)
    share = (usage / power.clamp_min(1e-30)).T.cpu().numpy()
    patterns = min(2**layers - 1, MAX_PATTERNS, count // rank, len(np.unique(share.round(9), axis=0)))
    if patterns < 2:
        return power.argsort(descending=True, stable=True)
    from sklearn.cluster import KMeans  # here, because it takes a second that planning need not wait for

    labels = torch.from_numpy(KMeans(patterns, n_init=4, random_state=seed).fit_predict(share)).to(power.device)
    order = []
    for label in labels.unique(sorted=True):
        members = (labels == label).nonzero()[:, 0]
        order.append(members[power[members].argsort(descending=True, stable=True)])
    return torch.cat(order)
