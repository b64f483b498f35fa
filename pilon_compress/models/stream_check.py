"""The block-by-block stream against the model's own forward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models.blocks import check_once
from pilon_compress.models.causality import check_causal
from pilon_compress.models.hidden_states import Stream, last_states, run_head
from pilon_compress.models.source import Source

ROWS, LENGTH = 2, 128  # texts that are compared, and tokens of each at most
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF = 3e-2  # half precision
TOKENS = 8
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def check_stream(source: Source, batch: Batch, head: bool = False) -> float:
    """Compare the last hidden states (with `head`: and the logits) of two rows of `batch` with those of the model.

    Returns the largest relative error (norms, padding left out). Raises BadInput if that exceeds what rounding explains
    or if the model does not run: its blocks then are not what conversion takes them for. Of a streamed source both
    sides read one block at a time.
    """
    check_once(source.model)
    part = Batch(batch.input_ids[:ROWS, :LENGTH], batch.mask[:ROWS, :LENGTH].long())
    with _refusing(source.model):
        stream = Stream(source, [part])
        for index in range(len(source.names)):
            with source.block(index) as block:
                stream.advance(block)
        worst = 0.0
        for run, with_head in ((last_states, False), (run_head, True)) if head else ((last_states, False),):
            with source.reading():
                own = run(source.model, part, source.device)
            ours = stream.finish(0, stream.hidden[0], slice(None), head=with_head)
            worst = max(worst, _relative_error(ours, own, stream.masks[0]))
        if head:
            with source.reading():
                check_causal(source.model, part.input_ids[:1].to(source.device))
    limit = TOLERANCE.get(source.model.dtype, HALF)
    if not worst <= limit:
        raise BadInput(
            f"{type(source.model).__name__} is more than its {len(source.names)} blocks one after another (relative "
            f"error {worst:.2g}, at most {limit:g}): it cannot be converted block by block"
        )
    return worst


@torch.no_grad()
def check_walk(model: PreTrainedModel) -> None:
    """Raise BadInput for a model on the meta device whose blocks are not each run once, first to last.

    Costs next to nothing, since stand-ins run in the place of the blocks: what `check_stream` would refuse after the
    weights are read is refused before a plan is shown. Where the model's code cannot run without weights, nothing is
    known and nothing is refused.
    """
    check_once(model)
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    try:
        Stream(_Skeleton(model), [Batch(ids)])
    except BadInput:
        raise
    except FAILURES:
        pass


class _Skeleton(Source):
    """A model on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._adopt(model)


def _relative_error(ours: Tensor, own: Tensor, mask: Tensor) -> float:
    """‖ours - own‖ / ‖own‖ over the tokens of `mask` (B, T). Raises BadInput where `own` is not finite."""
    ours, own = ours[mask].double(), own[mask].double()
    if not bool(own.isfinite().all()):
        raise BadInput("the model's own output is NaN or infinite on the calibration text")
    return float((ours - own).norm() / own.norm().clamp_min(1e-30))


@contextmanager
def _refusing(model: PreTrainedModel) -> Iterator[None]:
    """Turn what the model's code raises, when it is run on token ids and block by block, into one line."""
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
