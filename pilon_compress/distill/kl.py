"""Divergence of a student's predictions from its teacher's: sums over rows, of which few exist as logits at a time."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from pilon_compress.data.batch import IGNORED
from pilon_compress.distill.losses import Predictor, in_parts
from pilon_compress.nn.functional import kl_divergence, rows_at_once, soft_capped

SoftTargets = dict[str, Tensor]
"""A teacher's predictions for N rows. Either of

states (N, d), head (V, d), bias (V,) and cap () if any   its last hidden states and its language-model head
logits (N, V)                                             of a head that is more than that, see `models.head`
values (N, k), tokens (N, k) int64, rest (N,)             its k largest log-probabilities at the temperature, whose
                                                          they are, and the log of the mass of all others
"""

CONSTANT = ("head", "bias", "cap")  # of soft targets: not one for each row
COPIES = 2  # of logits that exist at once: the student's and the teacher's
MOST_TOP = -1e-6  # log of the student's mass on the teacher's k: nearer to 1 float32 cannot tell what is left from 0
NOTHING = -100.0  # log of a mass that is none: finite, so that no 0 · ∞ arises


def divergences(
    head: Predictor, hidden: Tensor, labels: Tensor, targets: SoftTargets, temperature: float, next_token: bool
) -> Tensor:
    """(2,): sums over rows of T² · KL(teacher ‖ student) at temperature T, and, if wanted, of -log p(label).

    `hidden` (N, d) are the student's; rows whose label is -100 do not count. T² keeps gradients as large as at T = 1
    (Hinton et al., 2015).
    """

    def part(span: slice) -> Tensor:
        logits = head(hidden[span]).float()
        wanted = {name: tensor if name in CONSTANT else tensor[span] for name, tensor in targets.items()}
        apart = divergence(logits, wanted, temperature) * (labels[span] != IGNORED)
        apart = apart.sum() * temperature**2
        if not next_token:
            return torch.stack([apart, torch.zeros_like(apart)])
        return torch.stack([apart, cross_entropy(logits, labels[span], ignore_index=IGNORED, reduction="sum")])

    return in_parts(part, len(hidden), rows_at_once(head.out_features, COPIES))


def divergence(logits: Tensor, targets: SoftTargets, temperature: float) -> Tensor:
    """(N,) nats: KL(teacher ‖ student) of each row of the student's `logits` (N, V) float32, both at `temperature`.

    Of soft targets of k values, the other tokens count as one: a lower bound, equal for k = V.
    """
    ours = (logits / temperature).log_softmax(-1)
    if "values" not in targets:
        return kl_divergence((_logits(targets) / temperature).log_softmax(-1), ours)
    top = ours.gather(-1, targets["tokens"])
    ours = torch.cat([top, torch.log(-torch.expm1(top.logsumexp(-1, True).clamp(max=MOST_TOP)))], -1)
    theirs = torch.cat([targets["values"].float(), targets["rest"].float()[:, None]], -1).log_softmax(-1)  # was rounded
    return kl_divergence(theirs, ours)


def _logits(targets: SoftTargets) -> Tensor:
    """(N, V) float32: the teacher's, where the targets hold them all."""
    if "logits" in targets:
        return targets["logits"].float()
    logits = linear(targets["states"], targets["head"], targets.get("bias")).float()
    return soft_capped(logits, targets["cap"]) if "cap" in targets else logits


def largest(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(values, tokens, rest) of soft targets, from the teacher's `logits` (N, V) float32."""
    log = (logits / temperature).log_softmax(-1)
    values, tokens = log.topk(count, dim=-1)
    others = log.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return values, tokens, others.clamp(min=NOTHING)
