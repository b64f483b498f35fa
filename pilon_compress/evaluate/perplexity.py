"""Perplexity and its kin for causal LMs, as the field computes them.

    PREFIX |--- window ---|                  every window begins as the tokenizer begins a text (`data.sequences`)
             stride PREFIX |--- window ---|  each scores the tokens that no earlier one did and that have a context

With a stride as long as the window this is the mean of `model(ids, labels=ids).loss` over windows, each weighed by its
tokens; with a shorter one it is the strided evaluation of transformers' documentation.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.data import sequences
from pilon_compress.data.batch import IGNORED, Batch
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import track
from pilon_compress.models.causality import check_causal
from pilon_compress.models.limits import check_length, longest_input
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.functional import kl_divergence, rows_at_once

LONGEST_WINDOW = 1024
COPIES = 2  # of logits that exist at once: those of both models
WORKING = 8  # copies in float32 while predictions are compared


def default_window(model: PreTrainedModel) -> int:
    """Return 1024 tokens, or the model's longest input if that is shorter."""
    return min(LONGEST_WINDOW, longest_input(model) or LONGEST_WINDOW)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    *,
    against: PreTrainedModel | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
) -> dict[str, Any]:
    """Score `documents`, joined by EOS, in windows and, with `against` (the dense model), compare both predictions.

    window       tokens of one input, prefix included; stride: by which windows advance (default: no overlap)
    max_windows  score so many windows at most (default: all of the text)

    Returns perplexity, bits_per_byte, tokens (scored), bytes (of UTF-8 that these stand for), window, stride,
    begins_with (tokens before every window, None for none), eos (True if it stands between documents and is scored);
    with `against` also dense_perplexity, dense_bits_per_byte, perplexity_ratio, kl (mean nats per token,
    KL(dense ‖ model)) and top1_agreement. Log-softmax in float32, sums in float64. Raises BadInput if the text is
    shorter than two tokens, the window does not fit the model, ids lie beyond the embedding, the two models differ in
    vocabulary, or a prediction is not finite.
    """
    window = window or default_window(model)
    before = sequences.prefix(tokenizer)
    room = sequences.body_length(window, before)
    _check(model, against, window, stride)
    stride = min(stride or room, room)
    limit = None if max_windows is None else (max_windows - 1) * stride + room
    ids, bytes_per_token = sequences.stream(tokenizer, documents, limit)
    if not ids or min(len(ids), room) + len(before) < 2:
        raise BadInput("the evaluation text, or the window, is shorter than two tokens")
    sequences.check_ids(tokenizer, max(ids), vocabulary(model.config))
    check_causal(model, torch.tensor([before + ids], device=model.device))
    rows = min(batch_size, rows_at_once(window * vocabulary(model.config), COPIES))
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for batch in track(list(_batches(_windows(ids, before, room, stride), rows)), "evaluating"):
        sums += _scores(model, against, batch)
        tokens += batch.scored
    if not bool(torch.isfinite(sums).all()):
        raise BadInput("the predictions on the evaluation text are NaN or infinite: no perplexity can be taken")
    nats = float(sums[0]) / tokens
    figures: dict[str, Any] = {
        "perplexity": math.exp(min(700.0, nats)),
        "bits_per_byte": nats / math.log(2) / bytes_per_token,
        "tokens": tokens,
        "bytes": round(tokens * bytes_per_token),
        "window": window,
        "stride": stride,
        "begins_with": sequences.begins_with(tokenizer),
        "eos": bool(sequences.separator(tokenizer)),
    }
    if against is not None:
        dense = math.exp(min(700.0, float(sums[1]) / tokens))
        figures |= {
            "dense_perplexity": dense,
            "dense_bits_per_byte": float(sums[1]) / tokens / math.log(2) / bytes_per_token,
            "perplexity_ratio": figures["perplexity"] / dense,
            "kl": max(0.0, float(sums[2]) / tokens),
            "top1_agreement": float(sums[3]) / tokens,
        }
    return figures


def _check(model: PreTrainedModel, against: PreTrainedModel | None, window: int, stride: int | None) -> None:
    for one in (model, against):
        if one is not None:
            check_length(one, window, "a window")
    if stride is not None and stride > window:
        raise BadInput(f"stride {stride} exceeds the window of {window}: tokens would be skipped")
    if against is not None and vocabulary(against.config) != vocabulary(model.config):
        sizes = f"{vocabulary(model.config)} and {vocabulary(against.config)}"
        raise BadInput(f"vocabularies of {sizes} tokens: these models' predictions cannot be compared")


def _windows(ids: Sequence[int], before: list[int], room: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (inputs, labels) of equal length: the token after each input, or -100 where it is scored elsewhere."""
    done = 0  # tokens of the stream that earlier windows covered
    for begin in range(0, len(ids), stride):
        whole = before + list(ids[begin : begin + room])
        end = min(begin + room, len(ids))
        inputs, labels = whole[:-1], whole[1:]
        fresh = min(end - done, len(labels))
        if fresh:
            yield inputs, [IGNORED] * (len(labels) - fresh) + labels[-fresh:]
        done = end
        if end == len(ids):
            break


def _batches(rows: Iterable[tuple[list[int], list[int]]], batch_size: int) -> Iterator[Batch]:
    """Yield batches (B, T), padded at the right end, which causal models do not look at."""
    rows = list(rows)
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        longest = max(len(inputs) for inputs, _ in batch)
        padded = [(i + [0] * (longest - len(i)), t + [IGNORED] * (longest - len(t))) for i, t in batch]
        yield Batch(torch.tensor([i for i, _ in padded]), labels=torch.tensor([t for _, t in padded]))


def _scores(model: PreTrainedModel, against: PreTrainedModel | None, batch: Batch) -> Tensor:
    """Sums over the scored tokens: nll, dense nll, KL(dense ‖ model), agreements. float64, (4,)."""
    kept = batch.targets.reshape(-1) != IGNORED
    wanted = batch.targets.reshape(-1)[kept]
    logits = [_logits(one, batch.input_ids, kept) for one in (model, against) if one is not None]
    sums = torch.zeros(4, dtype=torch.float64)
    rows = rows_at_once(logits[0].shape[-1], WORKING)
    for start in range(0, len(wanted), rows):
        span = slice(start, start + rows)
        target = wanted[span, None].to(logits[0].device)
        ours = logits[0][span].float().log_softmax(-1)
        sums[0] -= ours.gather(1, target).double().sum().cpu()
        if against is None:
            continue
        theirs = logits[1][span].float().log_softmax(-1)
        sums[1] -= theirs.gather(1, target).double().sum().cpu()
        sums[2] += kl_divergence(theirs, ours).double().sum().cpu()
        sums[3] += (ours.argmax(-1) == theirs.argmax(-1)).double().sum().cpu()
    return sums


def _logits(model: PreTrainedModel, inputs: Tensor, kept: Tensor) -> Tensor:
    """Predictions (N, V) at the positions that are `kept` (B · T,)."""
    out = model(input_ids=inputs.to(model.device), use_cache=False).logits
    rows = out.reshape(-1, out.shape[-1])
    return rows if bool(kept.all()) else rows[kept.to(out.device)]
