"""Recovery right after a conversion (`convert --refine`): the optimisation loop with a preset, in memory.

The converted model follows the dense one on unlabelled text: an encoder its states and embeddings, a causal LM its
predictions. Only banks, compositions, dense matrices and the projections' biases move.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from transformers import PreTrainedModel

from pilon_compress.config.training_sections import Distill, Optimizer, Run, Schedule
from pilon_compress.data.batch import Batch
from pilon_compress.data.loader import Shuffled
from pilon_compress.distill.kl import COPIES
from pilon_compress.distill.recovery import Recovery, hidden_weight, student_of
from pilon_compress.distill.teacher import CachingTeacher
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import say, track
from pilon_compress.models.task import is_causal, vocabulary
from pilon_compress.nn.functional import rows_at_once
from pilon_compress.nn.rescale import rescale_banks
from pilon_compress.optimize import schedule
from pilon_compress.optimize.loop import Diverged, train
from pilon_compress.optimize.optimizers import make_optimizers, restrict
from pilon_compress.optimize.training import Training, ValidationMetric, put, weights
from pilon_compress.parallel import World
from pilon_compress.results.conversion import Refinement

STEPS = 600
RATE = 3e-3  # short searches settle on too small a rate for a longer run
CHECKS = 12  # looks at the held-out text
WORST = 4.0  # times the held-out loss at the start: the run goes back to its best weights
HELD_OUT = 10  # one batch in so many
CACHED = 2**31  # bytes of what the dense model gives that are remembered; beyond that it runs at every step
OPTIMIZER = Optimizer(learning_rate=RATE, relative=True, weight_decay=0.0, betas=(0.9, 0.99), clip=None)
SCHEDULE = Schedule(kind="cosine", warmup=0.05)
LOSS = ValidationMetric("held_out_loss", "held-out loss", lambda loss: loss)


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

    `held_out` (default: every tenth batch, which is then not trained on) decides which weights are kept: the model
    never ends worse on it than it began, and is bit for bit what it was if nothing is gained. Equal seeds give equal
    weights on a CPU, unless `minutes` (wall time for all of it) ends the run. `rate` is relative to each tensor's root
    mean square, so that it means the same for every model. Weights must be float32. Raises BadInput if there is too
    little text to hold any out.
    """
    started = time.perf_counter()
    training, held = (list(batches), list(held_out)) if held_out else split(batches)
    with _only_composed(model, dense):
        original = weights(model)
        rescale_banks(model)
        job = _training(model, dense, training, held, steps, seed, rate)
        job.limit = None if minutes is None else 60 * minutes - (time.perf_counter() - started)
        with _RefinementMonitor(steps) as line, suppress(Diverged):
            train(job, line)
        kept = job.best < job.before
        if kept:
            put(job.trainee, job.best_weights)
        else:  # bit for bit what it was, scales included
            put(model, original)
    return Refinement(
        steps=job.step,
        seconds=time.perf_counter() - started,
        rate=rate * 0.5**job.halvings,
        halvings=job.halvings,
        before=job.before,
        after=job.best if kept else job.before,
        kept=kept,
        history=line.history,
    )


def _training(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    training: Sequence[Batch],
    held: Sequence[Batch],
    steps: int,
    seed: int,
    rate: float,
) -> Training:
    """The run: student, teacher, text, preset."""
    causal, asked = is_causal(model.config), Distill()
    training, held = ([one.to(model.device).labelled(causal) for one in some] for some in (training, held))
    teacher = CachingTeacher(dense, hidden_weight(asked, causal) > 0, CACHED)
    student = student_of(model, asked, teacher, held[len(held) // 2])
    recovery = Recovery(student, asked, teacher, causal)

    def validate() -> tuple[float, int]:
        losses = [float(student(*recovery.arguments(batch))) for batch in held]
        return sum(losses), sum(batch.scored for batch in held)

    return Training(
        world=World(0, 1, model.device),
        trainee=student,
        run=student,
        wrapped=student,
        optimizers=make_optimizers(student, OPTIMIZER.model_copy(update={"learning_rate": rate})),
        batches=Shuffled(training, seed, count := _micro_batches(model, training, causal)),
        micro_batches=count,
        steps=steps,
        validate=validate,
        prepare=recovery.prepared,
        callbacks=[recovery],
        how=Run(evaluate_every=-(-steps // CHECKS), log_every=steps, spike=None),
        rate=lambda share: schedule.rate(SCHEDULE, share),
        evaluate_first=True,
        keep_best=True,
        worst=WORST,
        metric=LOSS,
    )


def _micro_batches(model: PreTrainedModel, batches: Sequence[Batch], causal: bool) -> int:
    """Parts of a batch whose logits fit: those of a causal LM are many."""
    if not causal:
        return 1
    rows, length = (max(batch.input_ids.shape[axis] for batch in batches) for axis in (0, 1))
    return -(-rows // rows_at_once(length * vocabulary(model.config), COPIES))


class _RefinementMonitor:
    """The monitor of a refinement: the progress of the conversion, and the held-out losses for the report."""

    def __init__(self, steps: int) -> None:
        self.bar: Any = track(range(steps), "refining")
        self.history: list[tuple[int, float]] = []

    def __enter__(self) -> "_RefinementMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()  # of a run that ended early

    def log(self, step: int, figures: dict[str, Any]) -> None:
        if LOSS.name in figures:
            self.history.append((step, figures[LOSS.name]))

    def show(self, step: int, figures: dict[str, Any]) -> None:
        next(self.bar, None)

    def say(self, message: str) -> None:
        if LOSS.words not in message:
            say(f"refining: {message}")


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
def _only_composed(model: PreTrainedModel, dense: PreTrainedModel) -> Iterator[None]:
    """Gradients for banks, compositions, dense matrices and biases alone; modes, flags and configs are put back.

    A converted model may share its other tensors with the dense one, so nothing else may ever be trained.
    """
    modes = [(module, module.training) for one in (model, dense) for module in one.modules()]
    flags = [(p, p.requires_grad) for p in {id(p): p for one in (model, dense) for p in one.parameters()}.values()]
    caches = [(one.config, vars(one.config).get("use_cache")) for one in (model, dense)]
    try:
        dense.requires_grad_(False)
        restrict(model, "ffn")
        model.config.use_cache = False
        yield
    finally:
        for config, cache in caches:
            if cache is None:
                vars(config).pop("use_cache", None)
            else:
                config.use_cache = cache
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
