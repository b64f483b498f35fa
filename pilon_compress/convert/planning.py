"""Settling the plan of a conversion: moments over the calibration text, and the budget's allocation to layers.

A dry run and a conversion both come here, so that what one announces is what the other makes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pilon_compress.config.budget import Budget
from pilon_compress.config.effort import EFFORTS
from pilon_compress.convert.allocate.budget import Allocation, CannotSpend, Sizing, allocate, size_layers
from pilon_compress.convert.allocate.widths import uniform_width, with_whole_matrices
from pilon_compress.convert.calibrate.model_loss import ModelLoss
from pilon_compress.convert.calibrate.second_moments import Moments, gather
from pilon_compress.convert.calibrate.sensitivity import Sensitivity
from pilon_compress.convert.neurons.allocation import allocate_neurons
from pilon_compress.convert.prepare import ConversionJob, store_bytes
from pilon_compress.convert.sharing.acceptance import Acceptance, Accepted
from pilon_compress.convert.sharing.options import Sharing
from pilon_compress.convert.solve.bank_fit import BankFit
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.convert.solve.layer import Method
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.io.journal import Journal
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.families import Site
from pilon_compress.models.source import Source
from pilon_compress.nn.bands import trial_bands
from pilon_compress.results.conversion import SharingTrials

NO_BAND = "no band can share: it needs layers alike in shape, more than one of them in a band; change --bands"

log = logging.getLogger(__name__)

MEASURED = 0.6  # of an elastic file's neurons: the cut at which every layer's loss is measured


@dataclass(frozen=True)
class Planned:
    """A conversion whose plan is settled: `job` holds it, the other fields are what its solution starts from.

    `left`: by layer the neurons that stay (None: all). `fits`: shared banks by name, as the allocation fitted them.
    `worth`, `scales`: see `Allocation`.
    `slots`: see `Allocation`.
    `trials`: what `share: auto` has tried.
    """

    job: ConversionJob
    dense: Dense
    left: dict[int, Tensor | None] = field(default_factory=dict)
    fits: dict[str, BankFit] = field(default_factory=dict)
    worth: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    slots: dict[int, Tensor] = field(default_factory=dict)
    trials: SharingTrials | None = None


def plan_conversion(
    source: Source,
    job: ConversionJob,
    batches: Sequence[Batch],
    journal: Journal | None = None,
    moments: Moments | None = None,
    held_out: Sequence[Batch] | None = None,
) -> Planned:
    """Settle the plan: moments (where not given), then the allocation of the budget where the text decides sizes.

    held_out: text that judges trials of shared banks; without it the calibration text itself
    """
    journal, limit = journal or Journal(), job.recipe.max_memory
    if moments is None:
        store = put_away(journal, "moments", source.streamed, limit)
        moments = take_moments(source, batches, job.sites, job.causal, job.recipe.seed, store, journal)
    dense = Dense(source, job.sites, moments)
    if not job.allocated:
        return Planned(job, dense)
    known: Allocation | None = journal.get("allocation", Allocation.unpack)
    if known is not None:
        return planned_as(job, dense, Accepted(known, {}, journal.get("trials", read_trials)))
    budget, outputs = job.recipe.budget, put_away(journal, "reference", source.streamed, limit)
    elastic = job.recipe.form.elastic
    sensitivity = Sensitivity(source, batches, job.causal, outputs)
    measured = MEASURED * budget.stored_limit if elastic else None
    sizings = size_layers(dense, budget.stored_limit, sensitivity, budget.neurons, budget.rank_multiple, measured)
    outputs.clear()
    if elastic and any(sizing.elimination is None for sizing in sizings):
        raise BadInput(
            "form.elastic needs feed-forward blocks that are replaced as a whole: leave it out, "
            "or change --targets and --ignore"
        )
    if job.share == "none":
        accepted = Accepted(unshared(sizings, budget, elastic))
    elif budget.primitive == "neurons":
        accepted = Accepted(allocate_neurons(dense, sizings, budget.stored_limit, budget.mac_limit, budget.bands))
    else:
        accepted = share(dense, job, sizings, batches, held_out or batches)
    for name, fit in accepted.fits.items():
        journal.put(f"bank.{name}", fit.pack())
    if accepted.trials is not None:
        journal.put(
            "trials", {"json": torch.tensor(list(accepted.trials.model_dump_json().encode()), dtype=torch.uint8)}
        )
    journal.put("allocation", accepted.allocation.pack())
    return planned_as(job, dense, accepted)


def unshared(sizings: Sequence[Sizing], budget: Budget, elastic: bool) -> Allocation:
    """Allocate the budget without shared banks: factors and neurons, neurons alone, or one width for all layers."""
    if budget.uniform_width:
        return uniform_width(sizings, budget.stored_limit, budget.mac_limit, budget.multiple_of)
    if budget.whole_matrices:
        sizings = with_whole_matrices(sizings, budget.multiple_of)
    return allocate(sizings, budget.stored_limit, budget.mac_limit, elastic=elastic)


def read_trials(tensors: dict[str, Tensor]) -> SharingTrials:
    """Read the trials of shared banks that a journal holds."""
    return SharingTrials.model_validate_json(bytes(tensors["json"].tolist()))


def planned_as(job: ConversionJob, dense: Dense, accepted: Accepted) -> Planned:
    """Return the conversion with the allocation that was accepted."""
    found = accepted.allocation
    return Planned(
        job.planned(found.plan),
        dense,
        found.left,
        accepted.fits,
        found.worth,
        found.scales,
        found.slots,
        accepted.trials,
    )


def share(
    dense: Dense, job: ConversionJob, sizings: Sequence[Sizing], batches: Sequence[Batch], held_out: Sequence[Batch]
) -> Accepted:
    """Allocate with shared banks: for every band that can have them, or where the model's loss on `held_out` falls."""
    budget, settings = job.recipe.budget, job.recipe
    sweeps, layers = EFFORTS[settings.effort].sweeps, [one.layer for one in sizings if one.kind == "ffn"]
    sharing = Sharing(dense, budget.stored_limit, sweeps, settings.seed, budget.rank_multiple)
    bands = trial_bands(layers, budget.bands)
    menus = sharing.menus(sizings, bands)
    if not menus:
        raise BadInput(NO_BAND)
    if any(one.kind != "ffn" for one in sizings):
        log.info("feed-forward blocks alone share banks: attention stays each layer's own")
    if job.share == "always":
        try:
            return Accepted(allocate(sizings, budget.stored_limit, budget.mac_limit, menus, always=True))
        except CannotSpend:
            menus = sharing.menus(sizings, bands, down=True)
            return Accepted(allocate(sizings, budget.stored_limit, budget.mac_limit, menus, always=True))
    together = allocate(sizings, budget.stored_limit, budget.mac_limit, menus)
    alone = allocate(sizings, budget.stored_limit, budget.mac_limit)
    method = Method(settings.method, (), budget.stored_limit, job.quantization)
    loss = ModelLoss(dense.source, held_out, job.causal)
    return Acceptance(dense, method, batches if job.sequential else None, loss, sweeps, settings.seed).choose(
        sizings, alone, together
    )


def take_moments(
    source: Source,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    causal: bool,
    seed: int,
    store: TensorStore,
    journal: Journal,
) -> Moments:
    """The moments; of a streamed model they and the states between its blocks are files, which outlive a kill."""
    if source.streamed and journal.folder is not None:
        sums = journal.get_plain("moments")
        if isinstance(sums, dict):
            reason = store.damage(sums)
            if reason is None:
                store.adopt(sums, source.device)
                return Moments(store, source.device)
            log.warning("%s: the moments are taken again", reason)
            store.clear()
    moments = gather(source, batches, sites, causal=causal, seed=seed, store=store)
    if source.streamed:
        journal.put_plain("moments", store.checksums())
    return moments


def put_away(journal: Journal, name: str, streamed: bool, limit: float | None) -> TensorStore:
    """A tensor store that turns to files beside the output, if there is one.

    It does so at once for a streamed model, else beyond a share of the memory (`limit` in GiB).
    """
    if journal.folder is None:
        return TensorStore()
    return TensorStore(journal.folder / name, 0 if streamed else store_bytes(limit))
