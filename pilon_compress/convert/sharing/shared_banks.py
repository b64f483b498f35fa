"""The banks of a plan that several layers share, fitted jointly before the layers are solved one by one."""

from collections.abc import Mapping

from torch import Tensor

from pilon_compress.convert.plan import Plan
from pilon_compress.convert.sharing.joint_fit import fit_bank
from pilon_compress.convert.solve.bank_fit import BankFit
from pilon_compress.convert.solve.feed_forward import Dense
from pilon_compress.io.journal import Journal
from pilon_compress.io.progress import track


def fit_shared(
    dense: Dense,
    plan: Plan,
    left: Mapping[int, Tensor | None],
    known: Mapping[str, BankFit],
    seed: int,
    sweeps: int,
    journal: Journal,
) -> dict[str, BankFit]:
    """Fit every bank of several layers, in the dense model's metrics; by name.

    left: neurons that stay, by layer   known: banks that the allocation has fitted already
    """
    shared = [bank for bank in plan.banks if len(bank.sites) > 1]
    found = {bank.name: known[bank.name] for bank in shared if bank.name in known}
    unknown = [bank for bank in shared if bank.name not in found]
    for bank in track(unknown, "fitting shared banks") if unknown else []:
        kept: BankFit | None = journal.get(f"bank.{bank.name}", BankFit.unpack)
        fit = kept or fit_bank(dense.targets(bank, left), bank, seed, sweeps)
        if kept is None:
            journal.put(f"bank.{bank.name}", fit.pack())
        found[bank.name] = fit
    return found
