"""Perplexity and its kin for causal LMs, with everything stated that such a figure depends on.

EOS doc EOS doc EOS ...                     one stream of tokens; the first EOS only gives the first token a context
|--- window ---|
        |--- window ---|                    each window scores the tokens that no earlier one did, at most `stride`
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.errors import BadInput
from pilon_compress.progress import track

LONGEST_WINDOW = 1024
CHUNK = 512  # positions whose logits are held in float32 at a time


def default_window(config: PretrainedConfig) -> int:
    """1024 tokens, or the model's longest context if that is shorter."""
    return min(LONGEST_WINDOW, getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    against: PreTrainedModel | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Score every token of `documents` once and, with `against` (the dense model), compare the two distributions.

    Returns perplexity, bits_per_byte (of the UTF-8 text), tokens (scored), bytes, window, stride, eos (whether an EOS token
    stands before and between documents, scored like any other); and with `against` the same of the dense model,
    perplexity_ratio, kl (mean nats per token, KL(dense ‖ model)) and top1_agreement. Log-softmax in float32, sums in float64.
    Raises BadInput if the text is shorter than two tokens or the window does not fit the model.
    """
    window = window or default_window(model.config)
    stride = stride or window
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and window > longest:
        raise BadInput(f"a window of {window} tokens exceeds the model's {longest} positions")
    if stride > window:
        raise BadInput(f"stride {stride} exceeds the window of {window}: tokens would be skipped")
    ids, size = _stream(tokenizer, documents, max_tokens)
    if len(ids) < 2:
        raise BadInput("the evaluation text is shorter than two tokens")
    sums = torch.zeros(4, dtype=torch.float64)
    for inputs, labels in track(list(_batches(ids, window, stride, batch_size)), "evaluating"):
        sums += _scores(model, against, inputs, labels)
    tokens = len(ids) - 1
    figures = {
        "perplexity": math.exp(min(700.0, sums[0] / tokens)),
        "bits_per_byte": float(sums[0]) / math.log(2) / size,
        "tokens": tokens,
        "bytes": size,
        "window": window,
        "stride": stride,
        "eos": tokenizer.eos_token_id is not None,
    }
    if against is not None:
        dense = math.exp(min(700.0, sums[1] / tokens))
        figures |= {
            "dense_perplexity": dense,
            "dense_bits_per_byte": float(sums[1]) / math.log(2) / size,
            "perplexity_ratio": figures["perplexity"] / dense,
            "kl": max(0.0, float(sums[2]) / tokens),
            "top1_agreement": float(sums[3]) / tokens,
        }
    return figures


def _stream(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], max_tokens: int | None
) -> tuple[list[int], int]:
    """Token ids, and the UTF-8 bytes of the text that they stand for (less those of the first token, which is not scored)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, size = list(end), 0
    for document in documents:
        new = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        room = None if max_tokens is None else max_tokens + 1 - len(ids)
        if room is not None and len(new) > room:
            size += len(tokenizer.decode(new[:room]).encode())
            ids += new[:room]
            break
        ids += new + end
        size += len(document.encode())
        if max_tokens is not None and len(ids) > max_tokens:
            ids = ids[: max_tokens + 1]
            break
    if not end and ids:
        size -= len(tokenizer.decode(ids[:1]).encode())
    return ids, max(size, 1)


def _batches(ids: list[int], window: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (inputs, labels), both (B, T), labels -100 where an earlier window has scored the token or there is none."""
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
