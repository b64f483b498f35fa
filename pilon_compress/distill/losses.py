"""Losses. A trainee holds the model and computes its loss within `forward`, so that DDP, FSDP and
`torch.compile` see one module and one graph."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pilon_compress.data.batch import IGNORED
from pilon_compress.models.head import Head
from pilon_compress.nn.functional import rows_at_once


class Predictor(Protocol):
    """A language-model head: last hidden states (N, d) to logits (N, V), where V is `out_features`."""

    @property
    def out_features(self) -> int:
        """Return the number of tokens that are predicted."""

    def __call__(self, hidden: Tensor, /) -> Tensor: ...


class NextToken(nn.Module):
    """Cross-entropy of the next token, summed over the tokens that are scored (labels other than -100)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.head = model, Head(model)

    def forward(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """`inputs`: arguments of the model. `labels` (B, T) int64. The sum in nats, a scalar float32."""
        hidden = self.model.base_model(**inputs).last_hidden_state
        return next_token_sum(self.head, hidden.flatten(0, 1), labels.flatten())


def next_token_sum(head: Predictor, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over rows: `hidden` (N, d), `labels` (N,); rows of label -100 do not count."""

    def part(span: slice) -> Tensor:
        return cross_entropy(head(hidden[span]).float(), labels[span], ignore_index=IGNORED, reduction="sum")

    return in_parts(part, len(hidden), rows_at_once(head.out_features))


def in_parts(part: Callable[[slice], Tensor], count: int, rows: int) -> Tensor:
    """The sum of `part(span)` over `count` rows, so many `rows` at a time; parts are computed again going backward."""
    if count <= rows:
        return part(slice(None))
    spans = [slice(start, start + rows) for start in range(0, count, rows)]
    return torch.stack([checkpoint(part, span, use_reentrant=False) for span in spans]).sum(0)
