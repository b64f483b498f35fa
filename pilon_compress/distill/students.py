"""Trainees that follow a teacher. Its outputs come in as tensors, and so do the weights of the terms, which change
while training: one module and one graph for DDP, FSDP and `torch.compile`.

wanted (what `teacher.Teacher` gives)
  goal      causal LMs: its predictions, see `divergence.Goal`
  pooled    encoders: its embeddings (B, d)
  hidden    states behind every block, (B, T, d) each
  ffn       outputs of every feed-forward block, (B, T, d) each
  blocks    as `hidden`, before the final norm: fit block by block, and nothing else
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from pilon_compress.data.batch import IGNORED
from pilon_compress.distill.kl import divergences
from pilon_compress.distill.losses import next_token_sum
from pilon_compress.models import checkpoint
from pilon_compress.models.block_call import hidden_of
from pilon_compress.models.blocks import blocks
from pilon_compress.models.families import find_sites
from pilon_compress.nn.functional import mean_pooled

TERMS = ("kl", "next_token", "hidden", "ffn", "pooled")
Wanted = dict[str, Any]


class _Follower(nn.Module):
    """A student. `variances`: of the teacher's states, (layers,) for each of hidden, ffn, blocks that is matched."""

    def __init__(self, model: PreTrainedModel, places: Sequence[str], variances: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.places = model, list(places)
        for name, variance in variances.items():
            self.register_buffer(f"{name}_variance", variance, persistent=False)

    def _run(self, inputs: dict[str, Any], wanted: Wanted) -> tuple[Any, list[Tensor]]:
        """The base model's output, with hidden states if they are wanted, and what its feed-forward blocks put out."""
        options = {"output_hidden_states": True} if "hidden" in wanted else {}
        if "ffn" not in wanted:
            return self.model.base_model(**inputs, **options), []
        with captured(self.model, self.places) as outputs:
            return self.model.base_model(**inputs, **options), outputs

    def _matched(self, found: Any, ffn: list[Tensor], wanted: Wanted, terms: Tensor, weights: Tensor) -> Tensor | float:
        """What the states add to the loss; `weights` (B, T): how much each token counts."""
        total: Tensor | float = 0.0
        if "hidden" in wanted:
            variance = self.get_buffer("hidden_variance")
            total = total + terms[2] * mismatch(found.hidden_states[1:], wanted["hidden"], variance, weights)
        if "ffn" in wanted:
            total = total + terms[3] * mismatch(ffn, wanted["ffn"], self.get_buffer("ffn_variance"), weights)
        return total

    def _block_by_block(self, inputs: dict[str, Any], wanted: Wanted, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, last hidden states): each block maps what the student's blocks before it give to the teacher's output.

        No gradient passes from a block to those before it: each learns to mend their errors, not to make up for its own
        beforehand. All blocks learn at every step.
        """
        with separated(self.model) as (entered, left):
            last = self.model.base_model(**inputs).last_hidden_state
        loss = mismatch(left, wanted["blocks"], self.get_buffer("blocks_variance"), weights)
        return loss + 0.0 * entered[0].sum(), last  # DDP expects a gradient for every parameter


class Following(_Follower):
    """A causal LM that follows its teacher's predictions: the loss is a sum over the scored tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 1.0,
        next_token: bool = False,
        places: Sequence[str] = (),
        variances: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, places, variances or {})
        self.temperature, self.next_token = temperature, next_token

    def forward(
        self, inputs: dict[str, Any], labels: Tensor, wanted: Wanted | None = None, terms: Tensor | None = None
    ) -> Tensor:
        """`labels` (B, T) int64, `terms` (5,) float32, see TERMS. Without `wanted`: cross-entropy of the text."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if wanted is None:
            hidden = self.model.base_model(**inputs).last_hidden_state
            return next_token_sum(head, hidden.flatten(0, 1), labels.flatten(), cap)
        assert terms is not None
        scored = (labels != IGNORED).float()
        if "blocks" in wanted:
            loss, last = self._block_by_block(inputs, wanted, scored)
            return loss + 0.0 * head(last[:, :1]).sum()
        found, ffn = self._run(inputs, wanted)
        hidden, goal = found.last_hidden_state.flatten(0, 1), wanted["goal"]
        sums = divergences(head, hidden, labels.flatten(), goal, self.temperature, cap, self.next_token)
        return (terms[:2] * sums).sum() + self._matched(found, ffn, wanted, terms, scored)


class FollowingEmbeddings(_Follower):
    """An encoder that follows its teacher's embeddings of texts: the loss is a sum over texts."""

    def forward(
        self, inputs: dict[str, Any], labels: Tensor, wanted: Wanted | None = None, terms: Tensor | None = None
    ) -> Tensor:
        """`labels` (B,) int64: texts of label -100 do not count. Without `terms`: the sum of 1 - cosine alone."""
        assert wanted is not None
        mask, counts = inputs["attention_mask"].float(), (labels != IGNORED).float()
        weights = mask / mask.sum(1, keepdim=True).clamp_min(1) * counts[:, None]
        if "blocks" in wanted:
            loss, last = self._block_by_block(inputs, wanted, weights)
            return loss + 0.0 * last.sum()
        found, ffn = self._run(inputs, wanted if terms is not None else {})
        ours = normalize(mean_pooled(found.last_hidden_state.float(), mask), dim=1)
        apart = ((1 - (ours * normalize(wanted["pooled"].float(), dim=1)).sum(1)) * counts).sum()
        if terms is None:
            return apart
        return terms[4] * apart + self._matched(found, ffn, wanted, terms, weights)


def mismatch(ours: Sequence[Tensor], theirs: Sequence[Tensor], variances: Tensor, weights: Tensor) -> Tensor:
    """Squared error of states (B, T, d) over the teacher's variance: mean over dimensions and layers, sum over tokens
    with `weights` (B, T)."""
    errors = [((a.float() - b.float()).square().mean(-1) * weights).sum() for a, b in zip(ours, theirs, strict=True)]
    return (torch.stack(errors) / variances).mean()


def feed_forward_outputs(model: PreTrainedModel) -> list[str]:
    """Names, below the base model, of the projections whose outputs are those of the feed-forward blocks."""
    return [site.name for site in find_sites(checkpoint.empty_model(model.config)) if site.role == "down"]


@contextmanager
def captured(model: PreTrainedModel, places: Sequence[str]) -> Iterator[list[Tensor]]:
    """The outputs (B, T, d) of the modules of those names, in the order in which they run."""
    outputs: list[Tensor] = []
    handles = [
        model.base_model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output: outputs.append(hidden_of(output))
        )
        for name in places
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def separated(model: PreTrainedModel) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """(states that enter each block, states that leave it), (B, T, d) each; no gradient passes from block to block."""
    entered: list[Tensor] = []

    def detach(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "hidden_states" in kwargs:
            entered.append(kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": entered[-1].detach()}
        entered.append(args[0])
        return (args[0].detach(), *args[1:]), kwargs

    layers = blocks(model)
    handles = [layer.register_forward_pre_hook(detach, with_kwargs=True) for layer in layers.values()]
    try:
        with captured(model, list(layers)) as left:
            yield entered, left
    finally:
        for handle in handles:
            handle.remove()
