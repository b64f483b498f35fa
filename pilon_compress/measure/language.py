"""Perplexity and its kin for causal LMs, with everything stated that such a figure depends on.

EOS doc EOS doc EOS ...                     one stream of tokens; the first EOS only gives the first token a context
|--- window ---|
        |--- window ---|                    each window scores the tokens that no earlier one did, at most `stride`
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.errors import BadInput
from pilon_compress.progress import track

LONGEST_WINDOW = 1024
CHUNK = 512  # positions whose logits are held in float32 at a time
LOGITS = 2**27  # most logits that one forward pass may return: 512 MiB in float32


def default_window(config: PretrainedConfig) -> int:
    """1024 tokens, or the model's longest context if that is shorter."""
    return min(LONGEST_WINDOW, getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW)


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
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Score every token of `documents` once and, with `against` (the dense model), compare the two distributions.

    Returns perplexity, bits_per_byte (of the UTF-8 text), tokens (scored), bytes, window, stride, eos (whether an EOS
    token stands before and between documents, scored like any other); and with `against` the same of the dense model,
    perplexity_ratio, kl (mean nats per token, KL(dense ‖ model)) and top1_agreement. Log-softmax in float32, sums in
    float64. Raises BadInput if the text is shorter than two tokens, the window does not fit the model, the two models
    differ in vocabulary, or a prediction is not finite.
    """
    window = window or default_window(model.config)
    stride = stride or window
    _check(model, against, window, stride)
    ids, size = _stream(tokenizer, documents, max_tokens)
    if len(ids) < 2:
        raise BadInput("the evaluation text is shorter than two tokens")
    rows = max(1, min(batch_size, LOGITS // (window * model.config.vocab_size)))
    sums = torch.zeros(4, dtype=torch.float64)
    for inputs, labels in track(list(_batches(ids, window, stride, rows)), "evaluating"):
        sums += _scores(model, against, inputs, labels)
    if not bool(torch.isfinite(sums).all()):
        raise BadInput("the predictions on the evaluation text are NaN or infinite: no perplexity can be taken")
    tokens = len(ids) - 1
    figures = {
        "perplexity": math.exp(min(700.0, float(sums[0]) / tokens)),
        "bits_per_byte": float(sums[0]) / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
        "window": window,
        "stride": stride,
        "eos": tokenizer.eos_token_id is not None,
    }
    if against is not None:
        dense = math.exp(min(700.0, float(sums[1]) / tokens))
        figures |= {
            "dense_perplexity": dense,
            "dense_bits_per_byte": float(sums[1]) / math.log(2) / size,
            "perplexity_ratio": figures["perplexity"] / dense,
            "kl": max(0.0, float(sums[2]) / tokens),
            "top1_agreement": float(sums[3]) / tokens,
        }
    return figures


def _check(model: PreTrainedModel, against: PreTrainedModel | None, window: int, stride: int) -> None:
    for one in (model, against):
        longest = getattr(one.config, "max_position_embeddings", None) if one is not None else None
        if longest and window > longest:
            raise BadInput(f"a window of {window} tokens exceeds the model's {longest} positions")
    if stride > window:
        raise BadInput(f"stride {stride} exceeds the window of {window}: tokens would be skipped")
    if against is not None and against.config.vocab_size != model.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {against.config.vocab_size}"
        raise BadInput(f"vocabularies of {sizes} tokens: these models' predictions cannot be compared")


def _stream(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], max_tokens: int | None
) -> tuple[list[int], int]:
    """Token ids, the first of which only gives context, and the UTF-8 bytes of the text that the others stand for.

    Without EOS the stream begins with BOS, and without either its first token goes unscored.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids, size = [*(end or start)], 0
    limit = math.inf if max_tokens is None else max_tokens + 1
    for document in documents:
        text, new = _fit(tokenizer, document, limit - len(ids))
        if not ids:
            size -= len(tokenizer.decode(new[:1]).encode())
        ids += new
        size += len(text.encode())
        if text != document or len(ids) + len(end) > limit:
            break
        ids += end
    return ids, max(size, 1)


def _fit(tokenizer: PreTrainedTokenizerBase, text: str, limit: float) -> tuple[str, list[int]]:
    """`text` cut short until it has at most `limit` tokens, and its tokens: the bytes of a cut text are exact."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    while len(ids) > limit:
        text = text[: int(len(text) * limit / len(ids))]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text, ids


def _batches(ids: list[int], window: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (inputs, labels), both (B, T); label -100: scored by an earlier window, or padding."""
    rows = []
    scored = 1  # ids[0] has no context
    while scored < len(ids):
        end = min(len(ids), max(scored + stride, window + 1) if scored == 1 else scored + stride)
        start = max(0, end - 1 - window)
        inputs, labels = ids[start : end - 1], ids[start + 1 : end]
        fresh = end - scored
        rows.append((inputs, [-100] * (len(labels) - fresh) + labels[-fresh:]))
        scored = end
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        longest = max(len(inputs) for inputs, _ in batch)
        padded = [(i + [0] * (longest - len(i)), t + [-100] * (longest - len(t))) for i, t in batch]  # right: causal
        yield torch.tensor([i for i, _ in padded]), torch.tensor([t for _, t in padded])


def _scores(model: PreTrainedModel, against: PreTrainedModel | None, inputs: Tensor, labels: Tensor) -> Tensor:
    """Sums over the scored tokens: nll, dense nll, KL(dense ‖ model), agreements. float64, (4,)."""
    kept = labels.reshape(-1) != -100
    wanted = labels.reshape(-1)[kept]
    logits = [_logits(one, inputs, kept) for one in (model, against) if one is not None]
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(wanted), CHUNK):
        span = slice(start, start + CHUNK)
        target = wanted[span, None].to(logits[0].device)
        ours = logits[0][span].float().log_softmax(-1)
        sums[0] -= ours.gather(1, target).double().sum().cpu()
        if against is None:
            continue
        theirs = logits[1][span].float().log_softmax(-1)
        sums[1] -= theirs.gather(1, target).double().sum().cpu()
        sums[2] += (theirs.exp() * (theirs - ours)).double().sum().cpu()
        sums[3] += (ours.argmax(-1) == theirs.argmax(-1)).double().sum().cpu()
    return sums


def _logits(model: PreTrainedModel, inputs: Tensor, kept: Tensor) -> Tensor:
    out = model(input_ids=inputs.to(model.device), use_cache=False).logits
    return out.reshape(-1, out.shape[-1])[kept.to(out.device)]
