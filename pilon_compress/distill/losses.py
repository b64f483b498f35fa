"""What is minimised. A trainee holds the model and computes its loss within `forward`, so that DDP, FSDP and
`torch.compile` see one module and one graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pilon_compress.data.batch import IGNORED
from pilon_compress.nn.functional import rows_at_once, soft_capped


class NextToken(nn.Module):
    """Cross-entropy of the next token, summed over the tokens that are scored (labels other than -100)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """`inputs`: arguments of the model. `labels` (B, T) int64. The sum in nats, a scalar float32."""
        hidden = self.model.base_model(**inputs).last_hidden_state
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return next_token_sum(head, hidden.flatten(0, 1), labels.flatten(), _cap(self.model))


def next_token_sum(head: nn.Linear, hidden: Tensor, labels: Tensor, cap: float | None) -> Tensor:
    """Sum of -log p(label) over rows: `hidden` (N, d), `labels` (N,); rows of label -100 do not count."""

    def part(span: slice) -> Tensor:
        logits = soft_capped(head(hidden[span]).float(), cap)
        return cross_entropy(logits, labels[span], ignore_index=IGNORED, reduction="sum")

    return in_parts(part, len(hidden), rows_at_once(head.out_features))


def in_parts(part: Callable[[slice], Tensor], count: int, rows: int) -> Tensor:
    """The sum of `part(span)` over `count` rows, so many `rows` at a time; parts are computed again going backward."""
    if count <= rows:
        return part(slice(None))
    spans = [slice(start, start + rows) for start in range(0, count, rows)]
    return torch.stack([checkpoint(part, span, use_reentrant=False) for span in spans]).sum(0)


def _cap(model: PreTrainedModel) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)
