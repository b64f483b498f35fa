"""The converted model layer by layer: every projection in its plan's shape, each layer fitted behind those before."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pilon_compress.convert.plan import BankPlan, Plan
from pilon_compress.convert.solve.bank_fit import BankFit
from pilon_compress.convert.solve.feed_forward import Dense, FeedForward
from pilon_compress.convert.solve.gptq import round_bank
from pilon_compress.convert.solve.layer import LayerShape, Method, converted_block, resume_layer, solve_layer
from pilon_compress.convert.solve.neuron_fit import NeuronFit
from pilon_compress.convert.solve.neuron_layer import solve_neurons
from pilon_compress.convert.solve.sequential_targets import BlockPair
from pilon_compress.convert.solve.solved import Solved, SolvedBank, SolvedLayer, pack_layer, unpack_layer
from pilon_compress.data.batch import Batch
from pilon_compress.io.journal import Journal
from pilon_compress.io.progress import track
from pilon_compress.models.hidden_states import Stream

FitNeurons = Callable[[str, Stream | None, Stream | None], NeuronFit]


def solve(
    dense: Dense,
    plan: Plan,
    left: Mapping[int, Tensor | None],
    method: Method,
    *,
    fits: Mapping[str, BankFit] | None = None,
    neurons: FitNeurons | None = None,
    batches: Sequence[Batch] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    journal: Journal | None = None,
) -> Solved:
    """Solve every projection of `plan`, layer by layer.

    left: neurons that stay, by layer   fits: the banks of several layers by name, fitted in the dense metrics
    neurons: fits the plan's banks of neurons
    batches: where given, each layer is fitted to what the converted layers before it pass on for this text (see
    `sequential_targets`), shared banks by their compositions alone
    dtypes: the model's, and then, where it differs, that in which it is built: each rounds once
    Finished layers go to the journal, and are not computed again.
    """
    journal = journal or Journal()
    shared = rounded_banks(dense, plan, fits or {}, left, method.quantization, journal)
    theirs = None if batches is None else Stream(dense.source, batches)
    walk = LayerwiseSolver(
        dense, plan, left, method, shared, theirs, None if theirs is None else theirs.fork(), journal, (), neurons
    )
    solved = []
    for layer in track(range(max(dense.layers()) + 1), "converting layers"):
        found = walk.step(layer)
        solved.append({n: replace(one, weights=one.weights.stored_as(dtypes)) for n, one in found.items()})
    return Solved.of(plan, solved, shared, walk.stores)


@dataclass(frozen=True)
class LayerwiseSolver:
    """Solves one layer after the other; `theirs` and `ours`: streams of the dense and of the converted model.

    others: streams of other texts, which each converted block is to pass on   neurons: fits banks of neurons
    stores: those that are fitted, by name
    """

    dense: Dense
    plan: Plan
    left: Mapping[int, Tensor | None]
    method: Method
    shared: Mapping[str, SolvedBank]
    theirs: Stream | None
    ours: Stream | None
    journal: Journal
    others: Sequence[Stream] = ()
    neurons: FitNeurons | None = None
    stores: dict[str, NeuronFit] = field(default_factory=dict)

    def step(self, layer: int) -> SolvedLayer:
        """Solve a layer, or read it from the journal; both streams then stand behind it."""
        sites = self.dense.layers().get(layer, [])
        prefix = self.dense.source.names[layer]
        store = next((one.name for one in self.plan.neuron_banks if layer in one.layers), None)
        neurons = None if store is None else self._fitted(store)
        with self.dense.source.block(layer) as module:
            pair = None
            if self.theirs is not None and self.ours is not None:
                pair = BlockPair(module, copy.deepcopy(module), self.theirs, self.ours)
            solved: SolvedLayer = {}
            banks = {site.name: bank for bank in self.plan.banks for site in bank.sites}
            shape = LayerShape(banks, self.left.get(layer), self.shared, neurons)
            if sites:
                known: SolvedLayer | None = self.journal.get(
                    f"layer.{layer}", lambda tensors: unpack_layer(tensors, self.method.quantization)
                )
                if known is None:
                    blocks = [
                        FeedForward.of(module, prefix, layer, members, self.dense.moments)
                        for members in self.dense.blocks(layer).values()
                    ]
                    if neurons is None:
                        solved = solve_layer(blocks, shape, self.method, pair, prefix)
                    else:
                        solved = solve_neurons(blocks[-1], shape, self.method, pair, prefix)
                    self.journal.put(f"layer.{layer}", pack_layer(solved))
                else:
                    solved = known
                    if pair is not None:
                        resume_layer(sites, solved, shape, pair, prefix)
            elif pair is not None:
                pair.inputs()
            if pair is not None:
                pair.finish()
            if self.others:
                block = converted_block(module, prefix, sites, solved, shape) if sites else module
                for stream in self.others:
                    stream.advance(block)
        return solved

    def _fitted(self, store: str) -> NeuronFit:
        """The bank of neurons of that name, fitted where the streams stand before the first layer that uses it."""
        if store not in self.stores:
            assert self.neurons is not None
            self.stores[store] = self.neurons(store, self.theirs, self.ours)
        return self.stores[store]


def rounded_banks(
    dense: Dense,
    plan: Plan,
    fits: Mapping[str, BankFit],
    left: Mapping[int, Tensor | None],
    quantization: str | None,
    journal: Journal,
) -> dict[str, SolvedBank]:
    """Return the banks of several layers as they are stored, by name."""
    several = [bank for bank in plan.banks if len(bank.sites) > 1]
    return {bank.name: _rounded(dense, bank, fits[bank.name], left, quantization, journal) for bank in several}


def _rounded(
    dense: Dense,
    bank: BankPlan,
    fit: BankFit,
    left: Mapping[int, Tensor | None],
    quantization: str | None,
    journal: Journal,
) -> SolvedBank:
    """A shared bank as it is stored: in integers where the conversion asks for them."""
    if quantization is None:
        return SolvedBank(fit)
    name = f"rounded.{bank.name}"
    known: SolvedBank | None = journal.get(name, lambda tensors: SolvedBank.unpack(tensors, quantization))
    if known is None:
        known = SolvedBank(*round_bank(fit, dense.targets(bank, left), bank, quantization))
        journal.put(name, known.pack())
    return known
