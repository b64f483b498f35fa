"""Accept shared banks where the model's measured loss falls, band by band, behind the converted layers before.

The metric's loss does not decide: a band that lowers it by a tenth may leave the model as it was (docs/results/
sharing.md). So every band that the allocation would share is converted twice, with its banks and with factors and
matrices of its layers' own that store as many numbers, both behind the same converted prefix; the rest of the model
is dense, and the text is one that neither fit has seen. In the end the complete model is measured against that
without any sharing, and the better one is taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pilon_compress.convert.allocate.budget import Allocation, Sizing, allocate, dense_size
from pilon_compress.convert.calibrate.model_loss import ModelLoss
from pilon_compress.convert.plan import Plan
from pilon_compress.convert.sharing.shared_banks import fit_shared
from pilon_compress.convert.solve.bank_fit import BankFit
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.convert.solve.layer import Method
from pilon_compress.convert.solve.layerwise import LayerwiseSolver, rounded_banks
from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.io.journal import Journal
from pilon_compress.io.progress import track
from pilon_compress.models.hidden_states import Stream
from pilon_compress.results.conversion import SharingTrial, SharingTrials


@dataclass(frozen=True)
class Accepted:
    """The allocation that was chosen, its shared banks as fitted, and the measurements that chose it."""

    allocation: Allocation
    fits: dict[str, BankFit] = field(default_factory=dict)
    trials: SharingTrials | None = None


@dataclass(frozen=True)
class _Streams:
    """A place in the model: streams of the calibration text, dense and converted, and of the held-out text."""

    theirs: Stream | None
    ours: Stream | None
    exam: Stream

    def fork(self) -> "_Streams":
        theirs, ours = (None if one is None else one.fork() for one in (self.theirs, self.ours))
        return _Streams(theirs, ours, self.exam.fork())


@dataclass(frozen=True)
class Acceptance:
    """The inputs of trials. batches: the calibration text, None where layers are not fitted behind one another."""

    dense: Dense
    method: Method
    batches: Sequence[Batch] | None
    exam: ModelLoss
    sweeps: int
    seed: int = 0

    def choose(self, sizings: Sequence[Sizing], alone: Allocation, together: Allocation) -> Accepted:
        """Return the better of `alone`, which shares nothing, and what of `together` lowers the model's loss."""
        fits = fit_shared(self.dense, together.plan, together.left, {}, self.seed, self.sweeps, Journal())
        parts, verdicts, place = self._band_by_band(sizings, together, fits)
        if not any(verdict.accepted for verdict in verdicts):
            return Accepted(alone, {}, SharingTrials(bands=verdicts, loss=None, alone=None))
        loss, without = self.exam.of(place.exam), self.exam.of(self._converted(alone).exam)
        trials = SharingTrials(bands=verdicts, loss=min(loss, without), alone=without)
        return Accepted(alone, {}, trials) if loss > without else Accepted(*_joined(parts, fits), trials)

    def _band_by_band(
        self, sizings: Sequence[Sizing], together: Allocation, fits: Mapping[str, BankFit]
    ) -> tuple[list[Allocation], list[SharingTrial], _Streams]:
        """Return the parts that were chosen in turn, the trials, and the place behind the last one."""
        found, verdicts, place = list[Allocation](), list[SharingTrial](), self._start()
        for layers in track(together.plan.bands, "trying shared banks"):
            part = _part(together, layers)
            if len(layers) == 1:
                place = self._through(part, {}, place)
            else:
                private = _private(part, [sizing for sizing in sizings if sizing.layer in layers])
                here = self._through(part, fits, place.fork())
                other = None if private is None else self._through(private, {}, place)
                shared, loss = self.exam.of(here.exam), None if other is None else self.exam.of(other.exam)
                accepted = loss is None or shared < loss
                verdicts.append(SharingTrial(layers=list(layers), private=loss, shared=shared, accepted=accepted))
                if not accepted and private is not None and other is not None:
                    part, here = private, other
                place = here
            found.append(part)
        return found, verdicts, place

    def _start(self) -> _Streams:
        theirs = None if self.batches is None else Stream(self.dense.source, self.batches)
        return _Streams(theirs, None if theirs is None else theirs.fork(), self.exam.stream.fork())

    def _converted(self, allocation: Allocation) -> _Streams:
        return self._through(allocation, {}, self._start())

    def _through(self, allocation: Allocation, fits: Mapping[str, BankFit], place: _Streams) -> _Streams:
        """Convert the layers of `allocation` behind those before it; moves `place` behind them and returns it."""
        plan, left, quantization = allocation.plan, allocation.left, self.method.quantization
        shared = rounded_banks(self.dense, plan, fits, left, quantization, Journal())
        solver = LayerwiseSolver(
            self.dense, plan, left, self.method, shared, place.theirs, place.ours, Journal(), [place.exam]
        )
        for layer in range(place.exam.position, max(left) + 1):
            solver.step(layer)
        return place


def _part(allocation: Allocation, layers: Sequence[int]) -> Allocation:
    """Return the parts of an allocation that belong to some layers, as one band."""
    plan = allocation.plan
    banks = [bank for bank in plan.banks if bank.layers[0] in layers]
    matrices = [site for site in plan.matrices if site.layer in layers]
    names = {site.name for site in matrices} | {site.name for bank in banks for site in bank.sites}
    host = {name: shape for name, shape in plan.host.items() if name in names}
    return Allocation(
        Plan(plan.ratio, [list(layers)], banks, matrices, host),
        {layer: allocation.left[layer] for layer in layers},
        {layer: allocation.losses[layer] for layer in layers},
    )


def _private(part: Allocation, members: Sequence[Sizing]) -> Allocation | None:
    """Return the best parts of these layers' own that store no more than `part`; None if nothing is as small."""
    stored = sum(bank.stored() for bank in part.plan.banks) + sum(site.parameters for site in part.plan.matrices)
    try:
        return allocate(members, stored / dense_size(members)[0])
    except BadInput:
        return None


def _joined(parts: Sequence[Allocation], fits: Mapping[str, BankFit]) -> tuple[Allocation, dict[str, BankFit]]:
    """Join parts of a model, their bands numbered anew, and the fits of their shared banks by the new names."""
    bands = [band for part in parts for band in part.plan.bands]
    number = {layer: index for index, band in enumerate(bands) for layer in band}
    made, named = Allocation(Plan(parts[0].plan.ratio, bands, []), {}, {}), dict[str, BankFit]()
    plan = made.plan
    for part in parts:
        for bank in part.plan.banks:
            moved = replace(bank, band=number[bank.layers[0]])
            plan.banks.append(moved)
            if len(bank.sites) > 1:
                named[moved.name] = fits[bank.name]
        plan.matrices.extend(part.plan.matrices)
        plan.host.update(part.plan.host)
        made.left.update(part.left)
        made.losses.update(part.losses)
    return made, named
