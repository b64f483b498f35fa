"""Add exit gates to a model, in place, whose weights stay as they are."""

import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from pilon_compress.config.training_sections import ExitGates
from pilon_compress.data.batch import Batch
from pilon_compress.data.corpus import Corpus, Streamed
from pilon_compress.data.loader import Loader, in_order, permuted
from pilon_compress.errors import BadInput
from pilon_compress.io.messages import note
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models import checkpoint
from pilon_compress.nn.exits import add_gate, drop_gates
from pilon_compress.nn.installed import label_parts, layout_of
from pilon_compress.nn.size import block_macs
from pilon_compress.results.training import TrainedExits
from pilon_compress.train.exits.places import gate_places, own_projections, rank_of
from pilon_compress.train.exits.record import Recorder, valid_tokens
from pilon_compress.train.exits.solve import Solved, solve
from pilon_compress.train.exits.threshold import Held, Measured, choose

HELD_OUT = 2**14  # tokens that thresholds are measured on, at most
LEAST = 512  # tokens that gates are fitted on
ROWS = 4  # sequences that are run at a time on held-out text
IN_MEMORY = 2**31  # bytes of records; further ones wait in files


def add_exits(
    model: PreTrainedModel, corpus: Corpus, asked: ExitGates, dtype: torch.dtype, folder: Path, seed: int = 0
) -> TrainedExits:
    """Train gates for every feed-forward block of `model` (dense or PILON, float32), and put them into it.

    dtype: of the saved model, to which substitutes are rounded before a threshold is chosen   folder: for records that
    do not fit into memory; it is deleted. Raises BadInput for a model that cannot have gates.
    """
    started = time.perf_counter()
    blocks, recorder = price(model, corpus, asked, folder, seed)
    solved = gates_of(model, recorder, blocks, asked)
    for name, one in solved.items():
        for part in ("mean", "down", "up"):
            if hasattr(one.gate, part):
                setattr(one.gate, part, getattr(one.gate, part).to(dtype).float())
        add_gate(model.base_model.get_submodule(name), one.gate)
    label_parts(model)
    held = Held(model, held_out(corpus))
    best = choose(held, torch.stack([one.scores for one in solved.values()]), asked.max_perplexity_increase)
    seconds = time.perf_counter() - started
    return told(best, held, asked, recorder.tokens, next(iter(solved.values())).gate.substitute, seconds)


def price(
    model: PreTrainedModel, corpus: Corpus, asked: ExitGates, folder: Path, seed: int = 0
) -> tuple[list[str], Recorder]:
    """Record the blocks of a model, which loses gates that it has, on the training text: their names, the records."""
    drop_gates(model)
    places = gate_places(checkpoint.empty_model(model.config))
    own_projections(model, places)
    model.requires_grad_(False).eval()
    recorder = Recorder(model, list(places), TensorStore(folder, IN_MEMORY), seed)
    recorder.record(training_text(corpus, asked.tokens))
    if recorder.tokens < LEAST:
        raise BadInput(f"exit gates need {LEAST} tokens of training text at least (got {recorder.tokens}): name more")
    return list(places), recorder


def gates_of(model: PreTrainedModel, recorder: Recorder, blocks: Sequence[str], asked: ExitGates) -> dict[str, Solved]:
    """Solve the gate of every block, by the block's name; the records are used up."""
    layout = layout_of(model)
    work = {name: block_macs(layout, name) for name in blocks}
    mean = sum(work.values()) / len(work)
    found: dict[str, Solved] = {}
    for name in blocks:
        x, y, gradients = recorder.of(name)
        found[name] = solve(x, y, gradients, rank_of(x.shape[1], asked.substitute), work[name] / mean)
    recorder.store.clear()
    return found


def training_text(corpus: Corpus, tokens: int) -> Iterator[Batch]:
    """Yield rows of the training text, none of them twice, until they have `tokens` tokens or there are no more."""
    for batch in _rows(corpus.batches):
        yield batch
        tokens -= int(valid_tokens(batch).sum())
        if tokens <= 0:
            return


def _rows(batches: Loader | Streamed) -> Iterator[Batch]:
    """Yield all rows of stored text in an order drawn by the seed, or those of a stream as they come."""
    if isinstance(batches, Streamed):
        yield from (batches.batch(step) for step in count())
        return
    rows, length = batches.dataset, len(batches.dataset)
    for first in range(0, length, ROWS):
        places = np.arange(first, min(first + ROWS, length), dtype=np.int64)
        yield rows.batch([int(row) for row in permuted(places, length, batches.seed, 0)])


def held_out(corpus: Corpus) -> list[Batch]:
    """Return the validation rows, as far as they have HELD_OUT tokens."""
    found, tokens = [], 0
    for batch in in_order(corpus.validation, ROWS):
        if tokens < HELD_OUT:
            found.append(batch)
            tokens += batch.scored
    return found


def told(best: Measured, held: Held, asked: ExitGates, tokens: int, substitute: int, seconds: float) -> TrainedExits:
    """Return the figures of a choice, with a note where not one token may skip."""
    if not best.skipped:
        note(
            f"no token can skip a block within {asked.max_perplexity_increase:g} of the perplexity: the gates let none "
            "skip; raise --max-perplexity-increase, or give more text"
        )
    return TrainedExits(
        skipped=best.skipped,
        skipped_by_layer=best.by_layer,
        perplexity_without=held.perplexity,
        perplexity_increase=best.increase,
        max_perplexity_increase=asked.max_perplexity_increase,
        threshold=best.threshold,
        substitute=substitute,
        tokens=tokens,
        seconds=seconds,
    )
