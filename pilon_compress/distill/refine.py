"""Refinement of a freshly converted model on unlabelled text: it learns to do what the dense model does.

    encoders      every layer's states, and the direction of the pooled embeddings
    causal LMs    KL(dense ‖ PILON) of every prediction, and the states (Minitron's logit distillation)

Only banks, compositions, kept matrices and the projections' biases move.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.distill.refine_loop import Objective, Stage, descend, restore, snapshot
from pilon_compress.errors import BadInput
from pilon_compress.models.block_call import hidden_of
from pilon_compress.models.blocks import blocks
from pilon_compress.models.forward import run_base
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source
from pilon_compress.models.task import is_causal, vocabulary
from pilon_compress.nn.bank import PrimitiveBank
from pilon_compress.nn.composed_linear import ComposedLinear
from pilon_compress.nn.functional import kl_divergence, mean_pooled, rows_at_once
from pilon_compress.nn.layout import banks, kept_matrices, projections

STEPS = 600
RATE = 3e-3  # short searches settle on too small a rate for a longer run
HELD_OUT = 10  # one batch in so many
CACHED = 2**31  # bytes of dense states that are remembered; beyond that the dense model runs at every step
COSINE, STATES = 1.0, 0.1  # weights beside the main term of each loss


@dataclass
class Refinement:
    """What refinement did, for the report. `before` and `after`: held-out loss of the whole model."""

    stages: list[Stage]
    steps: int
    seconds: float
    before: float
    after: float
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def refine(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Batch],
    held_out: Sequence[Batch] | None = None,
    *,
    minutes: float | None = None,
    steps: int = STEPS,
    seed: int = 0,
    rate: float = RATE,
) -> Refinement:
    """Refine the PILON `model` in place so that it follows `dense` on `batches`, in at most `steps` optimiser steps.

    `held_out` (default: every tenth batch, which is then not trained on) decides which state is kept: the model never
    ends worse on it than it began. Equal seeds give equal weights on a
    CPU, unless `minutes` (wall time for all of it) ends the run. `rate` is relative, see `refine_loop.descend`. Weights
    must be float32. Raises BadInput if there is too little text to hold any out.
    """
    started = time.perf_counter()
    train, held = (list(batches), list(held_out)) if held_out else split(batches)
    with _only_composed(model, dense) as parameters:
        original = snapshot(parameters)
        balance(model)
        whole = _Whole(model, dense, train, held)
        before = whole.held_out()
        stages = []
        left = None if minutes is None else 60 * minutes - (time.perf_counter() - started)
        if left is None or left > 0:
            objective = Objective(len(train), whole.train, whole.held_out)
            stages.append(descend("whole", parameters, objective, steps=steps, seconds=left, seed=seed, rate=rate))
        balance(model)
        after = whole.held_out()
        kept = after < before
        if not kept:  # bit for bit what it was, balancing included
            restore(parameters, original)
    return Refinement(
        stages=stages,
        steps=sum(stage.steps for stage in stages),
        seconds=time.perf_counter() - started,
        before=before,
        after=after if kept else before,
        kept=kept,
    )


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(train, held out): every tenth batch is held out; of a single batch, its last tenth of sequences."""
    if len(batches) > 1:
        chosen = set(range(HELD_OUT // 2, len(batches), HELD_OUT)) or {len(batches) - 1}
        train = [batch for index, batch in enumerate(batches) if index not in chosen]
        return train, [batches[index] for index in sorted(chosen)]
    if not batches or len(batches[0].input_ids) < 2:
        raise BadInput("refinement needs at least two calibration sequences: one to learn from, one to hold out")
    only = batches[0]
    cut = len(only.input_ids) - max(1, len(only.input_ids) // HELD_OUT)
    return [only.rows(slice(cut))], [only.rows(slice(cut, None))]


@contextmanager
def _only_composed(model: PreTrainedModel, dense: PreTrainedModel) -> Iterator[list[nn.Parameter]]:
    """Both models in eval mode, with gradients for banks, compositions and biases alone; put back afterwards.

    A converted model may share its other tensors with the dense one, so nothing else may ever be trained.
    """
    modules = [*model.modules(), *dense.modules()]
    modes = [module.training for module in modules]
    every = list({id(p): p for m in (model, dense) for p in m.parameters()}.values())
    flags = [p.requires_grad for p in every]
    parameters = trained(model)
    try:
        model.eval(), dense.eval()
        for p in every:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield parameters
    finally:
        for p, flag in zip(every, flags, strict=True):
            p.requires_grad_(flag)
            p.grad = None
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def trained(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters that refinement moves: those of banks, compositions and dense matrices, each once."""
    modules: list[nn.Module] = []
    for _, composed in projections(model):
        modules += [composed.bank, composed]
    modules += [kept for _, kept in kept_matrices(model)]
    return list({id(p): p for module in modules for p in module.parameters()}.values())


@torch.no_grad()
def balance(model: PreTrainedModel) -> None:
    """Spread every component's magnitude evenly over its A column and B row, and bring its weights near 1.

    The function stays the same up to rounding. Adam moves all numbers of a tensor at one scale, so components of
    unequal or lopsided scale would learn at unequal rates. Softmax compositions keep their logits.
    """
    users: dict[int, list[ComposedLinear]] = {}
    for _, composed in projections(model):
        users.setdefault(id(composed.bank), []).append(composed)
    for _, bank in banks(model):
        layers = users.get(id(bank), [])
        if layers and all(layer.composition != "softmax" for layer in layers):
            _absorb(bank, layers)
        a, b = bank.A.norm(dim=1), bank.B.norm(dim=2)  # (n, r)
        scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-30)).sqrt(), 1.0)
        bank.A.mul_(scale[:, None, :])
        bank.B.div_(scale[:, :, None])


def _absorb(bank: PrimitiveBank, layers: Sequence[ComposedLinear]) -> None:
    """Move the root mean square of each component's weights, over the layers that use it, into the bank."""
    width = layers[0].weight.shape[1]
    if any(layer.weight.shape[1] != width for layer in layers):
        return
    total, count = bank.A.new_zeros(bank.n_primitives, width), bank.A.new_zeros(bank.n_primitives, 1)
    for layer in layers:
        total.index_add_(0, layer.selected, layer.weight.square())
        count.index_add_(0, layer.selected, torch.ones_like(layer.weight[:, :1]))
    size = (total / count.clamp_min(1)).sqrt()
    size = torch.where(size > 0, size, 1.0)
    for layer in layers:
        layer.weight.div_(size[layer.selected])
    bank.A.mul_(size[:, None, :])


class _Whole:
    """The loss, over whole batches; held-out text follows the training text in the numbering."""

    def __init__(
        self, model: PreTrainedModel, dense: PreTrainedModel, train: Sequence[Batch], held: Sequence[Batch]
    ) -> None:
        self.model, self.dense, self.batches, self.training = model, dense, [*train, *held], len(train)
        self.time_first = Stream(Source(dense), self.batches[:1]).time_first
        self.known: dict[int, tuple[list[Tensor], Tensor]] = {}
        self.bytes = 0
        self.causal = is_causal(model.config)
        with torch.no_grad():
            outputs = [_outputs(dense, batch, False, self.time_first) for batch in held]
        masks = [batch.mask.to(dense.device) for batch in held]
        self.variances = [_variance(list(states), masks) for states in zip(*(one[0] for one in outputs), strict=True)]

    def train(self, index: int) -> float:
        return self._sum(index, backward=True)

    @torch.no_grad()
    def held_out(self) -> float:
        held = range(self.training, len(self.batches))
        return sum(self._sum(index, backward=False) for index in held) / len(held)

    def _sum(self, index: int, backward: bool) -> float:
        """The loss of a batch, in parts of few enough logits; each part's gradient is added before the next is run."""
        batch = self.batches[index]
        rows = len(batch.input_ids)
        if self.causal:
            rows = rows_at_once(batch.input_ids.shape[1] * vocabulary(self.model.config))
        total, tokens = 0.0, float(batch.mask.sum())
        for start in range(0, len(batch.input_ids), rows):
            part = batch.rows(slice(start, start + rows))
            loss = self.loss(part, self._wanted(index, part)) * (float(part.mask.sum()) / tokens)
            if backward:
                loss.backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _wanted(self, index: int, part: Batch) -> tuple[list[Tensor], Tensor]:
        """What the dense model gives for `part` of a batch; remembered for encoders, whose parts are whole batches."""
        if index in self.known:
            return self.known[index]
        found = _outputs(self.dense, part, self.causal, self.time_first)
        size = sum(states.nbytes for states in (*found[0], found[1]))
        if not self.causal and self.bytes + size <= CACHED:
            self.known[index], self.bytes = found, self.bytes + size
        return found

    def loss(self, batch: Batch, dense: tuple[list[Tensor], Tensor]) -> Tensor:
        """One part's loss against the dense states and last output."""
        wanted, last = dense
        mask = batch.mask.to(self.model.device)
        states, ours = _outputs(self.model, batch, self.causal, self.time_first)
        errors = [_error(a, b, mask) / v for a, b, v in zip(states, wanted, self.variances, strict=True)]
        hidden = torch.stack(errors).mean()
        if self.causal:
            return _divergence(ours[mask], last[mask]) + STATES * hidden
        pooled, goal = (normalize(mean_pooled(x.float(), mask), dim=1) for x in (ours, last))
        return hidden + COSINE * (1 - (pooled * goal).sum(1).mean())


def _outputs(model: PreTrainedModel, batch: Batch, logits: bool, time_first: bool) -> tuple[list[Tensor], Tensor]:
    """Every block's states (B, T, d), and the logits (B, T, V) or the last hidden states (B, T, d).

    `time_first`: blocks lay their states out as (T, B, d).
    """
    states: list[Tensor] = []

    def note(_module: nn.Module, _args: object, output: object) -> None:
        hidden = hidden_of(output)
        states.append(hidden.transpose(0, 1) if time_first else hidden)

    handles = [block.register_forward_hook(note) for block in blocks(model).values()]
    try:
        if not logits:
            return states, run_base(model, batch).last_hidden_state
        ids, mask = batch.input_ids.to(model.device), batch.mask.long().to(model.device)
        return states, model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean KL(theirs ‖ ours) in nats of logits (N, V), in float32."""
    return kl_divergence(theirs.float().log_softmax(-1), ours.float().log_softmax(-1)).mean()


def _error(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of states (B, T, d) where `mask` (B, T)."""
    return (ours[mask].float() - theirs[mask].float()).square().mean()


def _variance(states: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    """Mean over dimensions of the variance over tokens."""
    rows = torch.cat([x[mask].float() for x, mask in zip(states, masks, strict=True)])
    return max(1e-12, float(rows.var(0, unbiased=False).mean()))
