"""Take down, after a conversion, what later cuts of it need: see `elastic.worth`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pilon_compress.convert.planning import Planned
from pilon_compress.elastic.factors import factorise
from pilon_compress.elastic.worth import BlockWorth
from pilon_compress.io.progress import track
from pilon_compress.models.families import Site

SHARE = 1 / 8  # factors of the neurons' moment, of the neurons: docs/results/elastic.md has other shares


@torch.no_grad()
def worth_of(planned: Planned) -> list[BlockWorth]:
    """Return the worth of every block of an elastic conversion; empty for any other."""
    if not planned.worth:
        return []
    ranks = {site.name: bank.rank for bank in planned.job.plan.banks for site in bank.sites}
    layers = planned.dense.layers()
    return [
        _block(planned, layers[layer], loss, ranks) for layer, loss in track(planned.worth.items(), "neurons' worth")
    ]


def _block(planned: Planned, sites: Sequence[Site], loss: Tensor, ranks: dict[str, int]) -> BlockWorth:
    ff, left, scale = planned.dense.read(sites[0].layer), planned.left[sites[0].layer], planned.scales[sites[0].layer]
    assert ff.down is not None and left is not None
    moment = ff.metrics[ff.down.name][left][:, left]
    variance, factors = factorise(moment, max(1, round(SHARE * len(left))))
    ups = [site for site in sites if site != ff.down]
    means = {site.name: ff.means[site.name] for site in sites if site.name in ranks}
    if ff.down.name in means:
        means[ff.down.name] = means[ff.down.name][left]
    return BlockWorth(
        down=ff.down.name,
        ups=[site.name for site in ups],
        halves=ups[0].d_out // ff.down.d_in,
        loss=loss,
        mean=ff.means[ff.down.name][left],
        variance=variance,
        factors=factors,
        savings={name: scale * ff.target(_named(sites, name), left).savings[: ranks[name]] for name in means},
        means=means,
    )


def _named(sites: Sequence[Site], name: str) -> Site:
    return next(site for site in sites if site.name == name)
