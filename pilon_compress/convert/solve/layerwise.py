"""The converted model layer by layer: every projection in its plan's shape, each layer fitted behind those before."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pilon_compress.convert.allocate.block_options import Block
from pilon_compress.convert.calibrate.second_moments import Moments
from pilon_compress.convert.plan import BankPlan, Plan
from pilon_compress.convert.sharing.joint_fit import BankFit, fit_bank, recompose
from pilon_compress.convert.solve.gptq import Rounded, round_bank, round_matrix
from pilon_compress.convert.solve.low_rank import Target
from pilon_compress.convert.solve.sequential_targets import Cross, Pair
from pilon_compress.data.batch import Batch
from pilon_compress.io.journal import Journal
from pilon_compress.io.progress import track
from pilon_compress.models.families import Site
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source
from pilon_compress.nn.sizing import affordable


@dataclass
class Solved:
    """What conversion found: bank fits by name, matrices (d_in, d_out) and biases by site name.

    Primitives and matrices are rounded to what will be saved as soon as their layer is done, the rest is float64.
    `rounded`: where they are whole numbers, those: of a matrix by site name, of a bank by its name with `.A`, `.B`.
    `errors`: by site name and method, the relative squared output error on the dense model's own inputs.
    `spectra`: by site name, the output power of each component of the whitened dense weight, largest first.
    """

    banks: dict[str, BankFit] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    rounded: dict[str, Rounded] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What to solve: the dense sites, the plan with their shapes, the neurons that stay by layer, and how."""

    sites: Sequence[Site]
    plan: Plan
    left: dict[int, Tensor | None]
    method: str
    baselines: Sequence[str]
    anchored: bool
    seed: int
    sweeps: int
    fits: dict[str, BankFit] = field(default_factory=dict)
    """Shared banks that are fitted already."""
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    """What the model computes in and then, where it differs, what it is built in: each rounds once."""
    quantization: str | None = None
    """One of `nn.integer.KINDS`: banks and matrices become whole numbers."""


def solve(source: Source, batches: Sequence[Batch], task: Task, moments: Moments, journal: Journal) -> Solved:
    """Solve every projection of `task.plan`, band by band and then layer by layer.

    Banks of several layers are fitted to all of them first, in the dense model's metrics; layer by layer their
    compositions, and everything private, are then fitted to what the converted layers before pass on (see `anchor`),
    if `task.anchored`. What is finished goes to the journal, and is not computed again.
    """
    solved = Solved()
    by_layer: dict[int, list[Site]] = {}
    for site in task.sites:
        by_layer.setdefault(site.layer, []).append(site)
    shared = [bank for bank in task.plan.banks if len(bank.sites) > 1]
    for bank in track(shared, "fitting shared banks") if shared else []:
        known: BankFit | None = journal.get(f"bank.{bank.name}", BankFit.unpack)
        fit = known or task.fits.get(bank.name)
        fit = fit or _fit_shared(source, bank, by_layer, task, moments)
        if known is None:
            journal.put(f"bank.{bank.name}", fit.pack())
        if task.quantization is not None:
            fit = _round_shared(source, bank, fit, by_layer, task, moments, solved, journal)
        solved.banks[bank.name] = fit
    theirs = Stream(source, batches) if task.anchored else None
    ours = theirs.fork() if theirs is not None else None
    last = max(by_layer)
    for layer in track(range(last + 1), "converting layers"):
        with source.block(layer) as module:
            standing = copy.deepcopy(module) if task.anchored else module
            pair = Pair(module, standing, theirs, ours) if theirs is not None and ours is not None else None
            if layer in by_layer:
                work = _Layer(layer, by_layer[layer], module, source.names[layer], task, moments, solved, pair)
                state: dict[str, Tensor] | None = journal.get(f"layer.{layer}")
                if state is None:
                    work.run()
                    journal.put(f"layer.{layer}", work.state())
                else:
                    work.load(state)
                work.settle()
            elif pair is not None:
                pair.inputs([], None)
            if pair is not None:
                pair.finish()
    return solved


def _fit_shared(
    source: Source, bank: BankPlan, by_layer: dict[int, list[Site]], task: Task, moments: Moments
) -> BankFit:
    return fit_bank(_targets(source, bank, by_layer, task, moments), bank, task.seed, task.sweeps)


def _round_shared(
    source: Source,
    bank: BankPlan,
    fit: BankFit,
    by_layer: dict[int, list[Site]],
    task: Task,
    moments: Moments,
    solved: Solved,
    journal: Journal,
) -> BankFit:
    assert task.quantization is not None
    name = f"rounded.{bank.name}"
    known = journal.get(name)
    if known is None:
        A, B = round_bank(fit, _targets(source, bank, by_layer, task, moments), bank, task.quantization)
        journal.put(name, {f"fit.{key}": t for key, t in fit.pack().items()} | A.pack("A") | B.pack("B"))
    else:
        fit = BankFit.unpack({key.removeprefix("fit."): t for key, t in known.items() if key.startswith("fit.")})
        A, B = (Rounded.unpack(side, known, task.quantization) for side in "AB")
    solved.rounded[f"{bank.name}.A"], solved.rounded[f"{bank.name}.B"] = A, B
    return fit


def _targets(
    source: Source, bank: BankPlan, by_layer: dict[int, list[Site]], task: Task, moments: Moments
) -> list[Target]:
    targets = []
    for site in bank.sites:
        with source.block(site.layer) as module:
            block = Block(site.layer, by_layer[site.layer], module, source.names[site.layer], moments)
        whole = next(one for one in block.sites if one.name == site.name)
        targets.append(block.target(whole, task.left.get(site.layer)))
    return targets


class _Layer:
    """The work on one layer: `run` computes it, `state` and `load` carry it through the journal."""

    def __init__(
        self,
        layer: int,
        sites: Sequence[Site],
        module: nn.Module,
        prefix: str,
        task: Task,
        moments: Moments,
        solved: Solved,
        pair: Pair | None,
    ) -> None:
        self.layer, self.sites, self.module, self.prefix, self.pair = layer, sites, module, f"{prefix}.", pair
        self.task, self.solved, self.moments = task, solved, moments
        self.left = task.left.get(layer)
        self.banks = {site.name: bank for bank in task.plan.banks for site in bank.sites}
        down = [site for site in sites if site.role == "down"]
        self.down = down[0] if len(down) == 1 and len(sites) > 1 else None

    def state(self) -> dict[str, Tensor]:
        """What `run` found, for the journal."""
        found: dict[str, Tensor] = {}
        for site in self.sites:
            name, bank = site.name, self.banks.get(site.name)
            if bank is None:
                found[f"{name}/kept"] = self.solved.kept[name]
            elif len(bank.sites) == 1:
                found |= {f"{name}/bank.{key}": tensor for key, tensor in self.solved.banks[bank.name].pack().items()}
            else:
                found[f"{name}/weight"] = self.solved.banks[bank.name].weight[self._place(site, bank)]
            if site.bias:
                found[f"{name}/bias"] = self.solved.biases[name]
            found[f"{name}/spectrum"] = self.solved.spectra[name]
            for key in self._whole_numbers(site):
                found |= self.solved.rounded[key].pack(f"{name}/rounded.{key}")
            for method, error in self.solved.errors[name].items():
                found[f"{name}/error.{method}"] = torch.tensor(error, dtype=torch.float64)
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Put what `state` gave where `run` would have put it, and move the streams on as it would have."""
        if self.pair is not None:
            self.pair.inputs([], None)
        for site in self.sites:
            name, bank = site.name, self.banks.get(site.name)
            approximation: Tensor
            mine = {key.removeprefix(f"{name}/"): t for key, t in state.items() if key.startswith(f"{name}/")}
            if bank is None:
                approximation = self.solved.kept[name] = mine["kept"]
            else:
                if len(bank.sites) == 1:
                    packed = {key.removeprefix("bank."): t for key, t in mine.items() if key.startswith("bank.")}
                    self.solved.banks[bank.name] = BankFit.unpack(packed)
                else:
                    self.solved.banks[bank.name].weight[self._place(site, bank)] = mine["weight"]
                approximation = self.solved.banks[bank.name].approximation(self._place(site, bank))
            if site.bias:
                self.solved.biases[name] = mine["bias"]
            self.solved.spectra[name] = mine["spectrum"]
            errors = {key.removeprefix("error."): float(t) for key, t in mine.items() if key.startswith("error.")}
            self.solved.errors[name] = errors
            for key in self._whole_numbers(site):
                assert self.task.quantization is not None
                self.solved.rounded[key] = Rounded.unpack(f"rounded.{key}", mine, self.task.quantization)
            self._stand_in(site, approximation, mine.get("bias"))

    def _whole_numbers(self, site: Site) -> list[str]:
        """Keys of `Solved.rounded` that are private to the site."""
        bank = self.banks.get(site.name)
        if self.task.quantization is None or (bank is not None and len(bank.sites) > 1):
            return []
        return [site.name] if bank is None else [f"{bank.name}.A", f"{bank.name}.B"]

    def settle(self) -> None:
        """Hold what is private to the layer as it will be saved: float64 of a whole model is large."""
        for site in self.sites:
            bank = self.banks.get(site.name)
            if bank is None:
                self.solved.kept[site.name] = self._rounded(self.solved.kept[site.name])
            elif len(bank.sites) == 1:
                fit = self.solved.banks[bank.name]
                fit.A, fit.B = self._rounded(fit.A), self._rounded(fit.B)

    def _rounded(self, tensor: Tensor) -> Tensor:
        for dtype in self.task.dtypes:
            tensor = tensor.to(dtype)
        return tensor.clone()  # a view would hold on to all of what it is a part of

    @staticmethod
    def _place(site: Site, bank: BankPlan) -> int:
        return [one.name for one in bank.sites].index(site.name)

    def local(self, site: Site) -> str:
        return site.name.removeprefix(self.prefix)

    def run(self) -> None:
        """Solve the layer: up and gate first, since what they do decides what down reads."""
        self.block = Block(self.layer, self.sites, self.module, self.prefix[:-1], self.moments)
        firsts = [site for site in self.sites if site != self.down]
        crosses: dict[str, Cross] = {}
        if self.pair is not None:
            wanted = list(dict.fromkeys(self.local(self._reads(site)) for site in firsts))
            crosses = self.pair.inputs(wanted, self.local(self.down) if self.down else None)
        for site in firsts:
            cross = crosses.get(self.local(self._reads(site)))
            start = self.block.target(site, self.left)
            self._solve(site, start, None if cross is None else self._through(site, cross))
        if self.down is not None:
            cross, start = None, self.block.target(self.down, self.left)
            if self.pair is not None:
                self._stand_in(self.down, start.weight, self._absorbed(self.down, start.weight))
                cross = self.pair.output(self.local(self.down))
            self._solve(self.down, start, cross)

    def _reads(self, site: Site) -> Site:
        return next(one for one in self.sites if one.name == site.input)

    def _through(self, site: Site, cross: Cross) -> Cross:
        """Moments with the dense input itself turned into moments with what the dense projection puts out."""
        weight = self.block.weights[site.name]
        if self.left is not None and self.block.down is not None:
            weight = weight[:, self.block.columns(site, self.left)]
        weight = weight.float()
        return Cross(cross.count, cross.mean_x, cross.mean_t @ weight, cross.xx, cross.xt @ weight)

    def _solve(self, site: Site, start: Target, cross: Cross | None) -> None:
        target = start if cross is None else cross.target(start, site.bias)
        bank, name = self.banks.get(site.name), site.name
        if bank is None:
            approximation = target.weight
            if self.task.quantization is not None:
                self.solved.rounded[name] = whole = round_matrix(target, self.task.quantization)
                approximation = whole.values[0]
            self.solved.kept[name] = approximation
        elif len(bank.sites) == 1:
            fit = self.solved.banks[bank.name] = fit_bank([target], bank, self.task.seed, method=self.task.method)
            if self.task.quantization is not None:
                A, B = round_bank(fit, [target], bank, self.task.quantization)
                self.solved.rounded[f"{bank.name}.A"], self.solved.rounded[f"{bank.name}.B"] = A, B
            approximation = fit.approximation(0)
        else:
            place = self._place(site, bank)
            if cross is not None:
                recompose(self.solved.banks[bank.name], place, target, bank)
            approximation = self.solved.banks[bank.name].approximation(place)
        if site.bias:
            bias = self._absorbed(site, approximation) if cross is None else cross.bias(approximation)
            assert bias is not None
            self.solved.biases[name] = bias if cross is None else bias + self._constant(site)
        self._judge(site, approximation)
        self._stand_in(site, approximation, self.solved.biases.get(name))

    def _constant(self, site: Site) -> Tensor:
        """The dense bias where the target is a weight's product alone; the residual sums contain it already."""
        bias = self.block.biases[site.name]
        if site == self.down:
            return torch.zeros_like(bias)
        return bias if self.left is None else bias[self.block.columns(site, self.left)]

    def _absorbed(self, site: Site, approximation: Tensor) -> Tensor | None:
        """b' = b + μ W - μ̂ Ŵ on the dense model's own inputs: the mean error of the output becomes zero."""
        if not site.bias:
            return None
        whole, mean, bias = self.block.weights[site.name], self.block.means[site.name], self.block.biases[site.name]
        output = bias + mean @ whole
        if self.left is None:
            return output - mean @ approximation
        if site == self.down:
            return output - mean[self.left] @ approximation
        return output[self.block.columns(site, self.left)] - mean @ approximation

    def _stand_in(self, site: Site, weight: Tensor, bias: Tensor | None) -> None:
        """Let the converted block compute with this weight (d_in, d_out) from here on."""
        if self.pair is None:
            return
        d_in, d_out = weight.shape
        linear = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
        like: Any = self.module.get_submodule(self.local(site)).weight
        linear.weight = nn.Parameter(weight.T.to(like).contiguous(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(like), requires_grad=False)
        self.pair.ours.set_submodule(self.local(site), linear)

    def _judge(self, site: Site, approximation: Tensor) -> None:
        whole = self.block.target(site, None)
        if self.left is not None and site == self.down:
            approximation = torch.zeros_like(whole.weight).index_copy(0, self.left, approximation)
        elif self.left is not None:  # what nobody reads is no error
            columns = self.block.columns(site, self.left)
            approximation = whole.weight.index_copy(1, columns, approximation)
        errors = {self.task.method: whole.output_loss(approximation)}
        rank = uniform_rank(site, self.task.plan.ratio)
        for method in self.task.baselines:
            if method not in errors:
                errors[method] = whole.truncation_loss(method, rank)
        self.solved.errors[site.name] = {method: max(0.0, value) for method, value in errors.items()}
        self.solved.spectra[site.name] = whole.spectrum


def uniform_rank(site: Site, ratio: float) -> int:
    """The rank of two factors that store `ratio` of the site's numbers: what the baselines get."""
    most = min(site.d_in, site.d_out)
    return max(1, affordable(ratio * site.parameters, site.d_out * site.bias, site.d_in + site.d_out, most))
