"""Record how a model calls its blocks on some batches, by a run with stand-ins for the blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models.block_call import BlockArguments, BlockOutput
from pilon_compress.models.blocks import blocks
from pilon_compress.models.forward import run_base
from pilon_compress.models.source import Source


@dataclass(frozen=True)
class Recording:
    """Arguments and results of a model's blocks on some batches, without the hidden states.

    calls: arguments by batch and block
    results: return value of a block by batch
    time_first: True if states are (T, B, d) instead of (B, T, d)
    """

    calls: list[list[BlockArguments]]
    results: list[BlockOutput]
    time_first: bool

    @classmethod
    @torch.no_grad()
    def of(cls, source: Source, batches: Sequence[Batch]) -> tuple["Recording", list[Tensor]]:
        """Record the arguments of every block by running the model with blocks that return the states unchanged.

        Also returns, by batch, the states that enter the first block, in the layout of the blocks.

        The first block runs for real: its output shows what the model expects beside the hidden states (a tuple with
        None, the position bias of T5). A probe batch of unequal sides shows which dimension counts the tokens.
        Raises BadInput for an architecture that does not call each block once, in order, on states of that shape.
        """
        with source.block(0) as first:
            forward = type(first).forward

            def real(*args: Any, **kwargs: Any) -> Any:
                return forward(first, *args, **kwargs)

            probe = _oblong(batches[0])
            hidden, _, result = _run_standing_in(source, probe, real)
            recording, states = cls([], [], _is_time_first(source.model, hidden, probe)), list[Tensor]()
            for batch in batches:
                entered, calls, own = _run_standing_in(source, batch, None if result.is_plain else real, result)
                states.append(entered)
                recording.calls.append(calls)
                recording.results.append(own)
        return recording, states


def _run_standing_in(
    source: Source, batch: Batch, first: Callable[..., Any] | None, result: BlockOutput | None = None
) -> tuple[Tensor, list[BlockArguments], BlockOutput]:
    """Run the model on `batch` with stand-ins for its blocks.

    Returns the states that enter the first block, every block's other arguments, and the stand-ins' return value
    without the states: `result`, or that of `first` called in the place of the first block.
    """
    entered: list[Tensor] = []
    calls: list[tuple[int, BlockArguments]] = []
    results: list[BlockOutput] = [] if result is None or first is not None else [result]

    def stand_in(index: int) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            hidden, call = BlockArguments.split(args, kwargs)
            entered.append(hidden)
            calls.append((index, call))
            if not results:
                assert first is not None
                results.append(BlockOutput.split(first(*args, **kwargs)))
            return results[0].filled(hidden)

        return note

    model = source.model
    with standing_in(model, stand_in):
        run_base(model, batch, source.device)
    names = list(blocks(model))
    if [names[index] for index, _ in calls] != source.names:
        raise BadInput(
            f"{type(model).__name__} does not run each of its {len(names)} blocks once, first to last "
            f"({len(calls)} calls): it cannot be converted block by block"
        )
    return entered[0], [call for _, call in calls], results[0]


def _is_time_first(model: PreTrainedModel, hidden: Tensor, batch: Batch) -> bool:
    """Return True if states are (T, B, d). Raises BadInput if they are neither that nor (B, T, d)."""
    shape, (rows, tokens) = tuple(hidden.shape), batch.input_ids.shape
    if len(shape) != 3 or shape[:2] not in ((rows, tokens), (tokens, rows)):
        raise BadInput(
            f"the blocks of {type(model).__name__} pass on states of shape {shape} for {rows} x {tokens} "
            "tokens, not (batch, tokens, width): it cannot be converted"
        )
    return shape[:2] != (rows, tokens)


@contextmanager
def standing_in(model: PreTrainedModel, forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace every block's forward by `forward(index)` inside the context."""
    layers: list[nn.Module] = list(blocks(model).values())
    for index, layer in enumerate(layers):
        layer.forward = forward(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _oblong(batch: Batch) -> Batch:
    """Return the first text of a batch, repeated if it has one token, so that texts and tokens differ in number."""
    rows = 1 if batch.input_ids.shape[1] > 1 else 2
    return Batch(batch.input_ids[:1].repeat(rows, 1), batch.mask[:1].long().repeat(rows, 1))
