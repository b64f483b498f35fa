"""Divide the neurons of a block into slices that are active together (CMoE: Pei et al., 2025, arXiv 2502.04416).

worth (T, N)    |activation| · norm of the neuron's row of `down`; CMoE takes the activation alone
shared          the neurons of the largest mean square; CMoE takes those that are active most often
active (T, N)   for each token the MOST of its neurons of the largest worth
experts         balanced k-means of the other columns of `active`: each expert gets as many, by linear assignment
first           of an expert the neuron whose worth follows the expert's best: a router of kind neurons reads it
linear router   ridge regression of the experts' worths on the block's input
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pilon_compress.convert.calibrate.damping import damped_solve
from pilon_compress.nn.specs import RouterSpec

MOST = 0.1  # of a block's neurons that count as active for a token
ROUNDS = 8  # of k-means, at most
RIDGE = 0.1  # of the mean diagonal, in the regression of a linear router
TOKENS = 16384  # of the calibration text that slices are found on, at most


def slice_neurons(hidden: Tensor, norms: Tensor, spec: RouterSpec) -> Tensor:
    """Return the neurons (recipes, k), int64, of every slice: the shared ones first.

    hidden: activations (T, N) that `down` reads, of any sign   norms (N,): of the rows of `down`
    """
    worth = hidden.abs() * norms
    neurons = worth.shape[1]
    size = neurons // spec.recipes
    top = worth.topk(max(1, round(MOST * neurons)), 1).indices
    active = torch.zeros_like(worth).scatter_(1, top, 1.0)
    order = worth.square().mean(0).argsort(descending=True, stable=True)
    shared, rest = order[: spec.shared * size], order[spec.shared * size :]
    experts = rest[balanced_clusters(active[:, rest].T.contiguous(), spec.experts)]
    rows = [first_most_alike(worth, expert) for expert in experts]
    return torch.cat([shared.view(spec.shared, size), torch.stack(rows)])


def balanced_clusters(points: Tensor, clusters: int) -> Tensor:
    """Divide `points` (n, d) into clusters of equal size, (clusters, n ÷ clusters) int64, near their means.

    The first points are the first means, as CMoE takes those that are active most often.
    """
    size = len(points) // clusters
    means, members = points[:clusters], torch.empty(0, dtype=torch.long, device=points.device)
    for _ in range(ROUNDS):
        costs = torch.cdist(points, means).square().repeat_interleave(size, 1)
        _, places = linear_sum_assignment(costs.cpu().double().numpy())
        owners = torch.from_numpy(places).to(points.device) // size
        found = torch.stack([(owners == cluster).nonzero()[:, 0] for cluster in range(clusters)])
        if torch.equal(found, members):
            break
        members, means = found, points[found].mean(1)
    return members


def first_most_alike(worth: Tensor, members: Tensor) -> Tensor:
    """Return the neurons `members` (k,) with that first whose worth (T, N) correlates best with the norm of all."""
    own = worth[:, members]
    whole = own.square().sum(1).sqrt()
    own, whole = own - own.mean(0), whole - whole.mean()
    alike = (whole @ own) / own.square().sum(0).sqrt().clamp_min(torch.finfo(own.dtype).tiny)
    best = int(alike.argmax())
    return torch.cat([members[best : best + 1], members[:best], members[best + 1 :]])


def linear_router(inputs: Tensor, worth: Tensor, experts: Tensor) -> Tensor:
    """Return the weights (E, d) of a router whose logits follow the worth of each expert; their deviation is 1.

    inputs (T, d) of the block   worth (T, N) of its neurons   experts (E, k): the neurons of each
    """
    wanted = torch.stack([worth[:, members].square().sum(1).sqrt() for members in experts], 1).double()
    rows = inputs.double()
    square = rows.T @ rows
    square.diagonal().add_(RIDGE * square.diagonal().mean().clamp_min(1e-30))
    weight = damped_solve(square, rows.T @ wanted)
    return (weight / (rows @ weight).std().clamp_min(1e-30)).T
