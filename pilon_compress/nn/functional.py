"""Functions of hidden states and logits that calibration, distillation and evaluation share."""

from torch import Tensor, tanh

LOGITS = 2**26  # numbers of logits that exist at once: 256 MiB in float32


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Return the embedding of each text (B, d): the mean of `states` (B, T, d) over tokens whose `mask` (B, T) is 1."""
    mask = mask.to(states.dtype)
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def kl_divergence(dense: Tensor, student: Tensor) -> Tensor:
    """Return KL(dense ‖ student) in nats of each row (N,), from log-probabilities (N, V)."""
    return (dense.exp() * (dense - student)).sum(-1)


def soft_capped(logits: Tensor, cap: Tensor | float | None) -> Tensor:
    """Return cap · tanh(logits / cap), as Gemma has it; `logits` themselves where `cap` is None."""
    return logits if cap is None else cap * tanh(logits / cap)


def rows_at_once(width: int, copies: int = 1) -> int:
    """Return how many rows of `width` logits fit into LOGITS numbers, at least one, if they exist `copies` times."""
    return max(1, LOGITS // (copies * width))
