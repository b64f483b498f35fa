"""Students that follow a teacher. Its outputs come in as tensors, and so do the weights of the terms, which change
while training: one module and one graph for DDP, FSDP and `torch.compile`.

wanted (see `teacher.Teacher.wanted`)
  soft_targets  causal LMs: its predictions, see `kl.SoftTargets`
  pooled        encoders: its embeddings (B, d)
  hidden        states behind every block, (B, T, d) each
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from pilon_compress.data.batch import IGNORED
from pilon_compress.distill.kl import divergences
from pilon_compress.distill.losses import next_token_sum
from pilon_compress.models.head import Head
from pilon_compress.nn.functional import mean_pooled

TERMS = ("kl", "next_token", "hidden", "pooled")
Wanted = dict[str, Any]


class _Student(nn.Module):
    """A student. `variance` (layers,): of the teacher's hidden states, where they are matched."""

    def __init__(self, model: PreTrainedModel, variance: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("variance", variance, persistent=False)

    def _run(self, inputs: dict[str, Any], wanted: Wanted) -> Any:
        """The base model's output, with hidden states if they are wanted."""
        options = {"output_hidden_states": True} if "hidden" in wanted else {}
        return self.model.base_model(**inputs, **options)

    def _matched(self, found: Any, wanted: Wanted, terms: Tensor, weights: Tensor) -> Tensor | float:
        """Return the hidden-state term of the loss; `weights` (B, T) of the tokens."""
        if "hidden" not in wanted:
            return 0.0
        return terms[2] * mismatch(found.hidden_states[1:], wanted["hidden"], self.get_buffer("variance"), weights)


class CausalStudent(_Student):
    """A causal LM that follows its teacher's predictions: the loss is a sum over the scored tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 1.0,
        next_token: bool = False,
        variance: Tensor | None = None,
    ) -> None:
        super().__init__(model, variance)
        self.temperature, self.next_token, self.head = temperature, next_token, Head(model)

    def forward(
        self, inputs: dict[str, Any], labels: Tensor, wanted: Wanted | None = None, terms: Tensor | None = None
    ) -> Tensor:
        """`labels` (B, T) int64, `terms` (4,) float32, see TERMS. Without `wanted`: cross-entropy of the text."""
        if wanted is None:
            hidden = self.model.base_model(**inputs).last_hidden_state
            return next_token_sum(self.head, hidden.flatten(0, 1), labels.flatten())
        assert terms is not None
        found = self._run(inputs, wanted)
        hidden, soft_targets = found.last_hidden_state.flatten(0, 1), wanted["soft_targets"]
        sums = divergences(self.head, hidden, labels.flatten(), soft_targets, self.temperature, self.next_token)
        return (terms[:2] * sums).sum() + self._matched(found, wanted, terms, (labels != IGNORED).float())


class EmbeddingStudent(_Student):
    """An encoder that follows its teacher's embeddings of texts: the loss is a sum over texts."""

    def forward(self, inputs: dict[str, Any], labels: Tensor, wanted: Wanted, terms: Tensor) -> Tensor:
        """`labels` (B,) int64: texts of label -100 do not count. `terms` (4,) float32, see TERMS."""
        mask, counts = inputs["attention_mask"].float(), (labels != IGNORED).float()
        weights = mask / mask.sum(1, keepdim=True).clamp_min(1) * counts[:, None]
        found = self._run(inputs, wanted)
        ours = normalize(mean_pooled(found.last_hidden_state.float(), mask), dim=1)
        apart = ((1 - (ours * normalize(wanted["pooled"].float(), dim=1)).sum(1)) * counts).sum()
        return terms[3] * apart + self._matched(found, wanted, terms, weights)


def mismatch(ours: Sequence[Tensor], theirs: Sequence[Tensor], variances: Tensor, weights: Tensor) -> Tensor:
    """Squared error of states (B, T, d) over the teacher's variance: mean over dimensions and layers, sum over tokens
    with `weights` (B, T)."""
    errors = [((a.float() - b.float()).square().mean(-1) * weights).sum() for a, b in zip(ours, theirs, strict=True)]
    return (torch.stack(errors) / variances).mean()
