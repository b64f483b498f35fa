"""Define the input and the output of every baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from pilon_compress.convert.calibrate.second_moments import SecondMoment
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.models.families import Site


@dataclass(frozen=True)
class Problem:
    """A dense model's projections and what calibration saw of their inputs.

    weights (d_in, d_out) float64 and biases (d_out,) by `Site.name`, moments by `Site.input`. Everything is held at
    once, with the decompositions that methods and ratios have in common: meant for models that fit in memory twice.
    """

    sites: Sequence[Site]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    moments: Mapping[str, SecondMoment]

    @cached_property
    def targets(self) -> dict[str, Target]:
        """Weight and metric of every site: centred where a bias absorbs the mean error, for every method alike."""
        made = {}
        for site in self.sites:
            moment = self.moments[site.input]
            metric = moment.covariance() if site.bias else moment.second_moment()
            made[site.name] = Target.of(site.name, site.layer, self.weights[site.name], metric)
        return made


@dataclass(frozen=True)
class Solution:
    """The result of a baseline.

    weights: the approximated (d_in, d_out) by `Site.name`   factors: the tensors that it would store for them
    macs: multiply-accumulates per token in that form
    kept: for sites that lose outputs altogether, the indices of those that stay
    """

    weights: dict[str, Tensor]
    factors: list[Tensor]
    macs: int
    kept: dict[str, Tensor] = field(default_factory=dict)


def pair_macs(site: Site, rank: int) -> int:
    """MACs of two factors of `rank`, or of their product where that is cheaper to multiply by."""
    return min(rank * (site.d_in + site.d_out), site.d_in * site.d_out)
