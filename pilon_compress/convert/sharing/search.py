"""Trial of shared banks: a band's layers fitted jointly, against the factors and matrices of each layer alone.

Layers that share have as many neurons as each other, and compose their weights from one bank per role that stores no
more than their own matrices and factors did. A band shares only if the joint fit's loss, in the metric that the
allocation used, is lower. That lowers the surrogate, not the model's loss: converted models with shared banks were no
better at ratios of 0.4 and 0.6, and worse at 0.2 (docs/results/conversion.md). Every layer uses the whole bank, which
costs 1.35 to 2.1 times the MACs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pilon_compress.convert.allocate.budget import Allocation, Sizing
from pilon_compress.convert.plan import BankPlan, Plan, down_of, trimmed
from pilon_compress.convert.sharing.joint_fit import fit_bank
from pilon_compress.convert.solve.bank_fit import BankFit
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.io.progress import track
from pilon_compress.models.families import Site
from pilon_compress.nn.sizing import FITTED_RANKS, UNLIMITED, BankBudget, size_bank

WIDER = (1.25, 1.6, 1e9)  # a shared block keeps so many times the neurons that its layers have alone; at last all
OWN_PRIMITIVES = 4  # primitives for each layer, at least: fewer leave nothing to share


@dataclass(frozen=True)
class Trial:
    """A band that shares: its banks with their fits, the neurons that stay by layer in order, the loss by layer."""

    banks: list[tuple[BankPlan, BankFit]]
    left: list[Tensor | None]
    losses: list[float]


@dataclass(frozen=True)
class Sharing:
    """The inputs of trials: the dense model, and the settings of bank fits; ranks are multiples of `multiple`."""

    dense: Dense
    sweeps: int
    seed: int = 0
    multiple: int = 1

    def apply(
        self, sizings: Sequence[Sizing], alone: Allocation, bands: Sequence[Sequence[int]]
    ) -> tuple[Allocation, dict[str, BankFit]]:
        """The allocation with the bands that gain by sharing, and their banks as fitted, by name."""
        by_layer = {sizing.layer: sizing for sizing in sizings}
        plan = Plan(alone.plan.ratio, [], [], [], {})
        left, losses, fits = dict[int, Tensor | None](), dict[int, float](), dict[str, BankFit]()
        for layers in track(bands, "trying shared banks"):
            members = [by_layer[layer] for layer in layers]
            whole = len(layers) > 1 and all(down_of(sizing.sites) is not None for sizing in members)
            found = self.best(members, alone, len(plan.bands)) if whole else None
            if found is None:
                for layer in layers:
                    _copy_layer(alone, layer, plan)
                    left[layer], losses[layer] = alone.left[layer], alone.losses[layer]
                continue
            plan.bands.append(list(layers))
            plan.banks.extend(bank for bank, _ in found.banks)
            fits |= {bank.name: fit for bank, fit in found.banks}
            for sizing, indices, loss in zip(members, found.left, found.losses, strict=True):
                left[sizing.layer], losses[sizing.layer] = indices, loss
                if indices is not None:
                    plan.host.update({site.name: (site.d_in, site.d_out) for site in sizing.sites})
        return Allocation(plan, left, losses), fits

    def best(self, sizings: Sequence[Sizing], alone: Allocation, band: int) -> Trial | None:
        """The best way for a band to share within what its layers store alone; None if alone is better."""
        layers = [sizing.layer for sizing in sizings]
        stored = sum(bank.stored() for bank in alone.plan.banks if bank.layers[0] in layers)
        stored += sum(site.parameters for site in alone.plan.matrices if site.layer in layers)
        down = down_of(sizings[0].sites)
        assert down is not None
        widths = [down.d_in if (indices := alone.left[layer]) is None else len(indices) for layer in layers]
        best, least = None, sum(alone.losses[layer] for layer in layers)
        for wider in WIDER:
            neurons = min(down.d_in, max(1, round(wider * sum(widths) / len(widths))))
            trial = self.trial(sizings, None if neurons == down.d_in else neurons, stored, band)
            if trial is not None and sum(trial.losses) < least:
                best, least = trial, sum(trial.losses)
            if neurons == down.d_in:
                break
        return best

    def trial(self, sizings: Sequence[Sizing], neurons: int | None, stored: int, band: int) -> Trial | None:
        """Fit a bank per role to layers with `neurons` each, within `stored` parameters; None if these are too few."""
        blocks = [self.dense.read(sizing.layer) for sizing in sizings]
        left = [sizing.left(neurons) for sizing in sizings]
        losses, targets, small = [], dict[str, list[Target]](), dict[str, list[Site]]()
        for sizing, block, indices in zip(sizings, blocks, left, strict=True):
            cut = sizing.elimination if neurons is not None else None
            losses.append(0.0 if cut is None or neurons is None else sizing.scale * cut.loss(neurons))
            for site in sizing.sites:
                target = block.target(site, indices)
                assert target.gradient is not None
                targets.setdefault(site.role, []).append(replace(target, gradient=sizing.scale * target.gradient))
                narrow = site if cut is None or neurons is None else trimmed(site, neurons, len(cut.order))
                small.setdefault(site.role, []).append(narrow)
        plans = _plans(small, stored, band, self.multiple)
        if plans is None:
            return None
        banks = [(bank, fit_bank(targets[role], bank, self.seed, self.sweeps)) for role, bank in plans.items()]
        for _, fit in banks:
            losses = [loss + more for loss, more in zip(losses, fit.losses, strict=True)]
        return Trial(banks, left, losses)


def _plans(sites: dict[str, list[Site]], stored: int, band: int, multiple: int) -> dict[str, BankPlan] | None:
    """Banks of equally many primitives for every role, as many as `stored` pays for; None if that is too few.

    Every layer selects every primitive.
    """
    layers = len(next(iter(sites.values())))
    budget = BankBudget(
        layers=layers,
        pair=sum(members[0].d_in + members[0].d_out for members in sites.values()),
        full_rank=min(min(members[0].d_in, members[0].d_out) for members in sites.values()),
        stored=stored - sum(site.d_out for members in sites.values() for site in members if site.bias),
        components=UNLIMITED,
        banks=len(sites),
    )
    size = size_bank(budget, ranks=FITTED_RANKS, own=OWN_PRIMITIVES, multiple=multiple)
    if size is None or size.n_primitives < OWN_PRIMITIVES * layers:
        return None
    return {role: BankPlan(band, role, tuple(members), *size) for role, members in sites.items()}


def _copy_layer(alone: Allocation, layer: int, plan: Plan) -> None:
    """Take one layer's own parts over, as a band of its own."""
    band = len(plan.bands)
    plan.bands.append([layer])
    plan.banks.extend(replace(bank, band=band) for bank in alone.plan.banks if bank.layers == [layer])
    mine = [site for site in alone.plan.matrices if site.layer == layer]
    plan.matrices.extend(mine)
    names = {site.name for site in mine} | {s.name for bank in plan.banks if bank.band == band for s in bank.sites}
    plan.host.update({name: shape for name, shape in alone.plan.host.items() if name in names})
