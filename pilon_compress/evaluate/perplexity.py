"""Measure perplexity, bits per byte and agreement with the dense model of causal LMs, in windows of a text.

    PREFIX |--- window ---|                  every window begins with the tokenizer's prefix (`data.sequences`)
             stride PREFIX |--- window ---|  a window scores the tokens that no earlier one scored and that have context

With a stride as long as the window this is the mean of `model(ids, labels=ids).loss` over windows, weighted by tokens;
with a shorter one it is the strided evaluation of transformers' documentation.
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
from pilon_compress.nn.skipping import counting
from pilon_compress.results.evaluation import Evaluation

LONGEST_WINDOW = 1024
COPIES = 2  # of logits in memory at once: those of both models
WORKING = 8  # float32 copies while predictions are compared


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
) -> Evaluation:
    """Score `documents`, joined by EOS, in windows, and compare the predictions with those of `against` (dense).

    window       tokens of one input, including the prefix (default: `default_window`)
    stride       tokens by which windows advance (default: no overlap)
    max_windows  most windows to score (default: all of the text)

    Log-softmax in float32, sums in float64. Raises BadInput if the text is shorter than two tokens, the window does not
    fit the model, ids lie beyond the embedding, the vocabularies differ, or a prediction is not finite.
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
    _check_ids(model, tokenizer, before + ids)
    rows = min(batch_size, rows_at_once(window * vocabulary(model.config), COPIES))
    batches = list(_batches(_windows(ids, before, room, stride), rows))
    sums = torch.zeros(4, dtype=torch.float64)
    with counting(model) as count:
        for batch in track(batches, "evaluating"):
            sums += _scores(model, against, batch)
            count.take(batch.targets != IGNORED)
    tokens = sum(batch.scored for batch in batches)
    begin, separator = sequences.begins_with(tokenizer), sequences.separator(tokenizer)
    metrics = _metrics(sums, tokens, bytes_per_token, against is not None)
    settings = {"window": window, "stride": stride, "begins_with": begin, "eos": bool(separator)}
    return Evaluation.model_validate({"kind": "causal", **metrics, **settings, **count.figures()})


def _metrics(sums: Tensor, tokens: int, bytes_per_token: float, compared: bool) -> dict[str, Any]:
    """Return the metrics of `measure` from the sums (4,) of `_scores`. Raises BadInput where a sum is not finite."""
    if not bool(torch.isfinite(sums).all()):
        raise BadInput("the predictions on the evaluation text are NaN or infinite: they have no perplexity")
    nats, dense_nats, kl, agreements = (float(total) / tokens for total in sums)
    perplexity, dense_perplexity = math.exp(min(700.0, nats)), math.exp(min(700.0, dense_nats))
    metrics: dict[str, Any] = {
        "perplexity": perplexity,
        "bits_per_byte": nats / math.log(2) / bytes_per_token,
        "tokens": tokens,
        "bytes": round(tokens * bytes_per_token),
    }
    if compared:
        metrics |= {
            "dense_perplexity": dense_perplexity,
            "dense_bits_per_byte": dense_nats / math.log(2) / bytes_per_token,
            "perplexity_ratio": perplexity / dense_perplexity,
            "kl": max(0.0, kl),
            "top1_agreement": agreements,
        }
    return metrics


def _check(model: PreTrainedModel, against: PreTrainedModel | None, window: int, stride: int | None) -> None:
    """Raise BadInput for windows, strides and pairs of models that `measure` cannot use."""
    for one in (model, against):
        if one is not None:
            check_length(one, window, "a window")
    if stride is not None and stride > window:
        raise BadInput(f"stride {stride} exceeds the window of {window}: tokens would be skipped")
    if against is not None and vocabulary(against.config) != vocabulary(model.config):
        sizes = f"{vocabulary(model.config)} and {vocabulary(against.config)}"
        raise BadInput(f"the models' vocabularies have {sizes} tokens, so their predictions cannot be compared")


def _check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Raise BadInput for ids beyond the model's embedding, and for a model that looks ahead on them."""
    sequences.check_ids(tokenizer, max(ids), vocabulary(model.config))
    check_causal(model, torch.tensor([ids], device=model.device))


def _windows(ids: Sequence[int], before: list[int], room: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (inputs, labels) of equal length; a label is the next token, or -100 where another window scores it."""
    done = 0  # tokens of the stream that earlier windows covered
    for begin in range(0, len(ids), stride):
        tokens = before + list(ids[begin : begin + room])
        end = min(begin + room, len(ids))
        inputs, labels = tokens[:-1], tokens[1:]
        fresh = min(end - done, len(labels))
        if fresh:
            yield inputs, [IGNORED] * (len(labels) - fresh) + labels[-fresh:]
        done = end
        if end == len(ids):
            break


def _batches(rows: Iterable[tuple[list[int], list[int]]], batch_size: int) -> Iterator[Batch]:
    """Yield batches (B, T), padded on the right, which does not affect causal models."""
    rows = list(rows)
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        longest = max(len(inputs) for inputs, _ in batch)
        padded = [(i + [0] * (longest - len(i)), t + [IGNORED] * (longest - len(t))) for i, t in batch]
        yield Batch(torch.tensor([i for i, _ in padded]), labels=torch.tensor([t for _, t in padded]))


def _scores(model: PreTrainedModel, against: PreTrainedModel | None, batch: Batch) -> Tensor:
    """Return sums over the scored tokens, (4,) float64: NLL, dense NLL, KL(dense ‖ model), top-1 agreements."""
    scored = batch.targets.reshape(-1) != IGNORED
    targets = batch.targets.reshape(-1)[scored]
    logits = [_logits(one, batch.input_ids, scored) for one in (model, against) if one is not None]
    sums = torch.zeros(4, dtype=torch.float64)
    rows = rows_at_once(logits[0].shape[-1], WORKING)
    for start in range(0, len(targets), rows):
        span = slice(start, start + rows)
        target = targets[span, None].to(logits[0].device)
        log_p = logits[0][span].float().log_softmax(-1)
        sums[0] -= log_p.gather(1, target).double().sum().cpu()
        if against is None:
            continue
        dense_log_p = logits[1][span].float().log_softmax(-1)
        sums[1] -= dense_log_p.gather(1, target).double().sum().cpu()
        sums[2] += kl_divergence(dense_log_p, log_p).double().sum().cpu()
        sums[3] += (log_p.argmax(-1) == dense_log_p.argmax(-1)).double().sum().cpu()
    return sums


def _logits(model: PreTrainedModel, inputs: Tensor, scored: Tensor) -> Tensor:
    """Return the logits (N, V) at the positions where `scored` (B · T,) is True."""
    out = model(input_ids=inputs.to(model.device), use_cache=False).logits
    rows = out.reshape(-1, out.shape[-1])
    return rows if bool(scored.all()) else rows[scored.to(out.device)]
