"""The optimisation loop on a loss of one number: the best weights, restarts from them, the time limit."""

import math

import pytest
import torch

from pilon_compress.config.training_sections import Optimizer, Run
from pilon_compress.data.batch import Batch
from pilon_compress.data.loader import Shuffled
from pilon_compress.optimize.loop import RESTARTS, Diverged, train
from pilon_compress.optimize.optimizers import make_optimizers
from pilon_compress.optimize.training import Training, put
from pilon_compress.parallel import World


class Slope(torch.nn.Module):
    """A loss that falls with x without end; NaN at the calls that `poisoned` is true for."""

    def __init__(self, poisoned=lambda call: False):
        super().__init__()
        self.x, self.calls, self.poisoned = torch.nn.Parameter(torch.ones(1)), 0, poisoned

    def forward(self, _inputs, _labels):
        self.calls += 1
        return self.x.sum() * (math.nan if self.poisoned(self.calls) else 1.0)


class Told:
    """A monitor that keeps what it is told."""

    def __init__(self):
        self.lines, self.said, self.shown = [], [], 0

    def log(self, step, figures):
        self.lines.append((step, figures))

    def show(self, step, figures):
        self.shown += 1

    def say(self, message):
        self.said.append(message)


def job_of(slope, steps=60, **changes):
    """A run whose validation loss is lowest at x = 0.5, which it passes by."""
    batch = Batch(torch.zeros(1, 1, dtype=torch.long)).labelled(causal=False)
    options = {"validate": lambda: (float((slope.x.detach() - 0.5).square()), 1), "evaluate_first": True} | changes
    return Training(
        world=World(0, 1, torch.device("cpu")),
        trainee=slope,
        run=slope,
        wrapped=slope,
        optimizers=make_optimizers(slope, Optimizer(relative=True, learning_rate=0.03, weight_decay=0.0)),
        batches=Shuffled([batch], seed=0),
        steps=steps,
        prepare=lambda batch: (batch.inputs(), batch.targets),
        how=Run(evaluate_every=5, log_every=10, spike=None),
        rate=lambda share: 1.0,
        **options,
    )


def test_the_best_weights_are_kept_not_the_last():
    slope, told = Slope(), Told()
    job = job_of(slope, keep_best=True)
    train(job, told)
    losses = {step: figures["val_perplexity"] for step, figures in told.lines if "val_perplexity" in figures}
    last = float((slope.x.detach() - 0.5).square())
    put(slope, job.best_weights)
    assert float((slope.x.detach() - 0.5).square()) == job.best < last
    assert min(losses.values()) == job.metric.of(job.best) < losses[60] and list(losses) == list(range(0, 61, 5))
    assert told.shown == 60


def test_a_loss_that_is_nan_goes_back_to_the_best_weights_at_half_the_rate():
    slope, told = Slope(poisoned=lambda call: call == 8), Told()
    job = job_of(slope, keep_best=True)
    train(job, told)
    assert job.halvings == 1 and job.step == 60 and job.restarted == 8 / 60
    assert job.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.03 / 2)
    (line,) = [line for line in told.said if "best weights" in line]
    assert "the loss is nan at step 8" in line
    assert torch.isfinite(slope.x).all() and job.best < 0.25


def test_the_schedule_begins_anew_with_every_restart():
    job = job_of(Slope(poisoned=lambda call: call == 30), keep_best=True)
    job.rate = lambda share: share
    seen = []
    step = job.optimizers[0].step
    job.optimizers[0].step = lambda *args: (seen.append(job.optimizers[0].param_groups[0]["lr"]), step(*args))[1]
    train(job, Told())
    assert seen[0] == pytest.approx(0.03 / 60) and seen[29] == pytest.approx(0.03 * 29 / 60)
    assert seen[31] == pytest.approx(0.015 * 1 / 30) and seen[59] == pytest.approx(0.015 * 29 / 30)


def test_nothing_but_nan_ends_the_run_with_the_first_weights():
    slope = Slope(poisoned=lambda call: True)
    job = job_of(slope, keep_best=True)
    with pytest.raises(Diverged, match=f"loss is nan at step {RESTARTS + 1}.*after {RESTARTS} restarts"):
        train(job, Told())
    assert job.best_weights["x"] == 1 and job.best == job.before


def test_a_run_that_keeps_no_weights_ends_at_the_first_nan():
    job = job_of(Slope(poisoned=lambda call: call == 8))
    with pytest.raises(Diverged, match="the loss is nan at step 8: lower optimizer.learning_rate$"):
        train(job, Told())


def test_a_validation_loss_that_runs_away_is_a_restart():
    slope = Slope()
    job = job_of(slope, steps=400, keep_best=True, worst=4.0)
    train(job, Told())
    assert job.halvings > 0 and float((slope.x.detach() - 0.5).square()) <= 4 * job.before


def test_a_time_limit_ends_the_run_and_looks_are_spread_over_it():
    slope, told = Slope(), Told()
    job = job_of(slope, steps=10**9, limit=0.5)
    job.how = Run(evaluate_every=10**8, log_every=10**9, spike=None)
    train(job, told)
    looks = [step for step, figures in told.lines if "val_perplexity" in figures]
    assert 0 < job.step < 10**9 and 2 <= len(looks) <= 12 and looks[-1] == job.step
