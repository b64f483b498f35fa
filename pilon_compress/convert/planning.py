"""Settling the plan of a conversion: moments over the calibration text, and the budget's allocation to layers.

A dry run and a conversion both come here, so that what one announces is what the other makes.
"""

import logging
from dataclasses import dataclass, field

from torch import Tensor

from pilon_compress.config.effort import EFFORTS
from pilon_compress.convert.allocate.budget import Allocation, allocate, size_layers
from pilon_compress.convert.calibrate.second_moments import Moments, gather
from pilon_compress.convert.calibrate.sensitivity import Sensitivity
from pilon_compress.convert.prepare import Job, shelf_bytes
from pilon_compress.convert.sharing.joint_fit import BankFit
from pilon_compress.convert.sharing.search import Sharing
from pilon_compress.convert.sharing.similar_layers import similar_bands
from pilon_compress.data.batch import Batch
from pilon_compress.io.journal import Journal
from pilon_compress.io.offload import Shelf
from pilon_compress.models.source import Source
from pilon_compress.nn.bands import split_bands

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A conversion whose plan is settled: `job` holds it, the other fields are what its solution starts from.

    `left`: by layer the neurons that stay (None: all). `fits`: shared banks by name, as the allocation fitted them.
    """

    job: Job
    moments: Moments
    left: dict[int, Tensor | None] = field(default_factory=dict)
    fits: dict[str, BankFit] = field(default_factory=dict)


def plan_conversion(
    source: Source,
    job: Job,
    batches: list[Batch],
    journal: Journal | None = None,
    moments: Moments | None = None,
) -> Planned:
    """Settle the plan: moments (where not given), then the allocation of the budget where the text decides sizes."""
    journal = journal or Journal()
    settings, budget = job.recipe, job.recipe.budget
    moments = moments or take_moments(source, batches, job, journal)
    if not job.allocated:
        return Planned(job, moments)
    known: Allocation | None = journal.get("allocation", Allocation.unpack)
    if known is not None:
        return Planned(job.planned(known.plan), moments, known.left)
    waiting = put_away(source, job, journal, "reference")
    truth = Sensitivity(source, batches, job.causal, waiting)
    sizings = size_layers(source, job.sites, moments, budget.ratio, truth, budget.neurons)
    del truth
    waiting.clear()
    found, fits = allocate(sizings, budget.ratio, budget.mac_limit), dict[str, BankFit]()
    if job.shares:
        if budget.banding == "similar":
            bands = similar_bands(source, sizings, moments)
        else:
            bands = split_bands([sizing.layer for sizing in sizings], None)
        sharing = Sharing(source, moments, EFFORTS[settings.effort].sweeps, settings.seed, budget.align)
        found, fits = sharing.apply(sizings, found, bands)
        for name, fit in fits.items():
            journal.put(f"bank.{name}", fit.pack())
    journal.put("allocation", found.pack())
    return Planned(job.planned(found.plan), moments, found.left, fits)


def take_moments(source: Source, batches: list[Batch], job: Job, journal: Journal) -> Moments:
    """The moments; of a streamed model they and the states between its blocks are files, which outlive a kill."""
    shelf = put_away(source, job, journal, "moments")
    if source.streamed and journal.folder is not None:
        sums = journal.get_plain("moments")
        if isinstance(sums, dict):
            reason = shelf.damage(sums)
            if reason is None:
                shelf.adopt(sums, source.device)
                return Moments(shelf, source.device)
            log.warning("%s: the moments are taken again", reason)
            shelf.clear()
    moments = gather(source, batches, job.sites, causal=job.causal, seed=job.recipe.seed, shelf=shelf)
    if source.streamed:
        journal.put_plain("moments", shelf.checksums())
    return moments


def put_away(source: Source, job: Job, journal: Journal, name: str) -> Shelf:
    """A shelf that turns to files beside the output, if there is one, beyond a share of the memory, or at once."""
    if journal.folder is None:
        return Shelf()
    return Shelf(journal.folder / name, 0 if source.streamed else shelf_bytes(job.recipe.max_memory))
