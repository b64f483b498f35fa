"""Define the candidates of a comparison, and build those of published baselines."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.compare.baselines.approximation import approximate
from pilon_compress.compare.baselines.problem import Problem
from pilon_compress.convert.calibrate.second_moments import SecondMoment
from pilon_compress.convert.solve.feed_forward import dense_weight
from pilon_compress.models.families import Site
from pilon_compress.nn.size import DENSE_ITEMSIZE, Size


@dataclass(frozen=True)
class Candidate:
    """A compressed model to be judged, its FFN's size, and the relative squared output error of every projection."""

    model: PreTrainedModel
    size: Size
    losses: list[float]


def baseline(method: str, ratio: float, problem: Problem, dense: PreTrainedModel) -> Candidate:
    """Run one of BASELINES and put its weights into a copy of `dense`."""
    found = approximate(method, problem, ratio)
    whole = dense_size(problem.sites)
    size = Size(
        stored=found.stored,
        dense_stored=whole.stored,
        bytes=found.bytes,
        dense_bytes=whole.bytes,
        macs=found.macs,
        dense_macs=whole.macs,
    )
    return Candidate(install(dense, found.weights, found.biases), size, list(found.losses.values()))


def dense_size(sites: Sequence[Site]) -> Size:
    """The dense FFN over itself."""
    stored = sum(site.parameters for site in sites)
    macs = sum(site.d_in * site.d_out for site in sites)
    return Size(stored, stored, stored * DENSE_ITEMSIZE, stored * DENSE_ITEMSIZE, macs, macs)


def problem_of(dense: PreTrainedModel, sites: Sequence[Site], moments: Mapping[str, SecondMoment]) -> Problem:
    """Return the baselines' problem: weights (d_in, d_out) and biases in float64, and moments of the inputs."""
    modules = {site.name: dense.base_model.get_submodule(site.name) for site in sites}
    weights = {site.name: dense_weight(modules[site.name]) for site in sites}
    biases = {name: module.bias.detach().double() for name, module in modules.items() if module.bias is not None}
    return Problem(sites, weights, biases, moments)


@torch.no_grad()
def install(dense: PreTrainedModel, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of `dense` with these weights (d_in, d_out) and biases (d_out,) by site; it shares every other tensor."""
    shared = {id(tensor): tensor for tensor in chain(dense.parameters(), dense.buffers())}
    model = copy.deepcopy(dense, memo=dict(shared))
    for name, weight in weights.items():
        module = model.base_model.get_submodule(name)
        turned = weight if type(module).__name__ == "Conv1D" else weight.T
        module.weight = nn.Parameter(turned.to(module.weight.dtype).contiguous())
        if name in biases:
            module.bias = nn.Parameter(biases[name].to(module.bias.dtype))
    return model.eval()
