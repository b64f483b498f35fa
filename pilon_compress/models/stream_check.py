"""Compare the block-by-block stream with the model's own forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models.blocks import check_once
from pilon_compress.models.causality import check_causal
from pilon_compress.models.forward import last_states, run_head
from pilon_compress.models.hidden_states import Stream
from pilon_compress.models.source import Source

TEXTS, LENGTH = 2, 128  # texts that are compared, and the most tokens of each
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative error that rounding explains, by dtype
HALF_TOLERANCE = 3e-2  # of bfloat16 and float16
WALK_TOKENS = 8  # length of the sequence on the meta device
# exceptions that the model's code raises when it is run in another way than it was written for
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def check_stream(source: Source, batch: Batch, head: bool = False) -> float:
    """Compare the last hidden states (with `head` also the logits) of two texts of `batch` with those of the model.

    Returns the largest relative error (of norms, without padding). Raises BadInput if it exceeds what rounding explains
    or if the model does not run: conversion cannot treat it as a chain of blocks. With a streamed source both sides
    read one block at a time.
    """
    check_once(source.model)
    part = Batch(batch.input_ids[:TEXTS, :LENGTH], batch.mask[:TEXTS, :LENGTH].long())
    with _errors_in_one_line(source.model):
        stream = Stream(source, [part])
        for index in range(len(source.names)):
            with source.block(index) as block:
                stream.advance(block)
        worst = 0.0
        for run, with_head in ((last_states, False), (run_head, True)) if head else ((last_states, False),):
            with source.reading():
                own = run(source.model, part, source.device)
            streamed = stream.finish(0, stream.hidden[0], slice(None), head=with_head)
            worst = max(worst, _relative_error(streamed, own, stream.masks[0]))
        if head:
            with source.reading():
                check_causal(source.model, part.input_ids[:1].to(source.device))
    limit = TOLERANCE.get(source.model.dtype, HALF_TOLERANCE)
    if not worst <= limit:
        raise BadInput(
            f"{type(source.model).__name__} is more than its {len(source.names)} blocks one after another (relative "
            f"error {worst:.2g}, at most {limit:g}): it cannot be converted block by block"
        )
    return worst


@torch.no_grad()
def check_walk(model: PreTrainedModel) -> None:
    """Raise BadInput for a model on the meta device that does not run each block once, first to last.

    Stand-ins replace the blocks, so this is fast and comes before the weights are read, unlike `check_stream`. A model
    whose code cannot run without weights passes.
    """
    check_once(model)
    ids = torch.zeros(1, WALK_TOKENS, dtype=torch.long, device="meta")
    try:
        Stream(Source(model, check=False), [Batch(ids)])
    except BadInput:
        raise
    except FAILURES:
        pass


def _relative_error(streamed: Tensor, own: Tensor, mask: Tensor) -> float:
    """Return ‖streamed - own‖ / ‖own‖ over the tokens of `mask` (B, T). Raises BadInput where `own` is not finite."""
    streamed, own = streamed[mask].double(), own[mask].double()
    if not bool(own.isfinite().all()):
        raise BadInput("the model's own output is NaN or infinite on the calibration text")
    return float((streamed - own).norm() / own.norm().clamp_min(1e-30))


@contextmanager
def _errors_in_one_line(model: PreTrainedModel) -> Iterator[None]:
    """Turn exceptions of the model's code into BadInput with one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except BadInput as error:
        name = type(model).__name__
        raise error if name in str(error) else BadInput(f"{name} cannot be converted: {error}") from error
    except FAILURES as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"{type(model).__name__} does not run on token ids block by block ({lines[0]}): it cannot be converted"
        ) from error
