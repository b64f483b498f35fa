"""Measure an encoder's fidelity: cosine and shared nearest neighbours of its embeddings and the dense model's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress.data.batch import Batch
from pilon_compress.data.sequences import check_ids
from pilon_compress.errors import BadInput
from pilon_compress.io.progress import track
from pilon_compress.models.forward import embeddings
from pilon_compress.models.limits import longest_input
from pilon_compress.models.task import vocabulary
from pilon_compress.results.evaluation import Evaluation

NEIGHBORS = 10  # nearest texts that are compared


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int = 256,
) -> Tensor:
    """Return embeddings (N, d), float32: means of the last hidden states over each text's tokens, without padding.

    Texts are truncated to `max_length` tokens. Raises BadInput if an embedding is NaN or infinite.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # similar lengths together need little padding
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    starts = range(0, len(order), batch_size)
    limit = min(max_length, longest_input(model) or max_length)
    for start in track(starts, "embedding", total=len(starts)):
        indices = order[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in indices], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(model.device)
        check_ids(tokenizer, int(batch["input_ids"].max()), vocabulary(model.config))
        pooled = embeddings(model, Batch(batch["input_ids"], batch["attention_mask"]))
        for index, row in zip(indices, pooled.cpu(), strict=True):
            rows[index] = row
    result = torch.stack(rows)
    if not bool(torch.isfinite(result).all()):
        raise BadInput("the embeddings of the evaluation texts are NaN or infinite: they cannot be compared")
    return result


def measure(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int = 256,
) -> Evaluation:
    """Compare the embeddings of `texts` by both models: their mean cosine, and the nearest texts that they share.

    Raises BadInput for fewer than eleven texts.
    """
    check(texts)
    converted, original = (
        torch.nn.functional.normalize(embed(m, tokenizer, texts, batch_size=batch_size, max_length=max_length), dim=1)
        for m in (model, dense)
    )
    return Evaluation(
        kind="encoder",
        cosine=float((converted * original).sum(1).mean()),
        neighbors10=shared_neighbours(converted, original),
        texts=len(texts),
    )


def check(texts: Sequence[str]) -> None:
    """Raise BadInput if there are too few texts for ten neighbours each."""
    if len(texts) <= NEIGHBORS:
        raise BadInput(
            f"{len(texts)} paragraphs are too few to compare {NEIGHBORS} neighbours: give at least {NEIGHBORS + 1}"
        )


def shared_neighbours(a: Tensor, b: Tensor) -> float:
    """Return the mean share of a text's ten nearest texts that embeddings `a` and `b` (N, d) agree on, for N > 10."""
    a, b = (torch.nn.functional.normalize(embeddings, dim=1) for embeddings in (a, b))
    return float((_nearest(a)[:, :, None] == _nearest(b)[:, None, :]).any(2).float().mean())


def _nearest(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-torch.inf)
    return similarity.topk(NEIGHBORS, dim=1).indices
