"""`Batch`: rows of tokens for calibration, training and evaluation, and its construction from pieces of a stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100  # label that cross entropy does not score


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. Tensors are int64 (B, T) unless stated otherwise; in brackets the meaning of None.

    input_ids
    attention_mask  1, or 0 for padding (no padding)
    labels          language models: the token AFTER each of `input_ids`, so that scoring shifts nothing; -100 is not
                    scored. Separate texts of an encoder: (B,), -100 for texts that do not count (nothing is scored:
                    calibration)
    position_ids    from 0 at the start of every document if `document` is given (from 0 in every row)
    document        index of the token's document in its row (a row is one document)
    soft_targets    predictions of a teacher, tensors (B, T, ...) by name: see `distill.kl.SoftTargets` (none)
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    document: Tensor | None = None
    soft_targets: dict[str, Tensor] | None = None

    @property
    def mask(self) -> Tensor:
        """Return (B, T) bool: True where a token is not padding."""
        mask = self.attention_mask
        return torch.ones_like(self.input_ids, dtype=torch.bool) if mask is None else mask.bool()

    @property
    def targets(self) -> Tensor:
        """Return `labels` of a batch that has them."""
        assert self.labels is not None, "a batch without labels cannot be scored"
        return self.labels

    @property
    def scored(self) -> int:
        """Return the number of tokens, or of separate texts, that count in the loss."""
        return int((self.targets != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Return the number of tokens that count in the loss, or that separate texts in the loss consist of."""
        if self.targets.dim() == 2:
            return self.scored
        return int(self.mask[self.targets != IGNORED].sum())

    def unscored(self) -> "Batch":
        """Return the batch without labels, for a process that must run a forward pass but has no share of the step."""
        return replace(self, labels=torch.full_like(self.targets, IGNORED))

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, span: slice | Tensor) -> "Batch":
        """Return the rows of `span`, a slice or indices (n,)."""
        return self._mapped(lambda tensor: tensor[span])

    def labelled(self, causal: bool) -> "Batch":
        """Return the batch with labels: the next tokens of each row, or, not `causal`, every row as a text."""
        if not causal:
            texts = torch.zeros(len(self.input_ids), dtype=torch.int64, device=self.input_ids.device)
            return replace(self, attention_mask=self.mask.long(), labels=texts)
        labels = torch.full_like(self.input_ids, IGNORED)
        labels[:, :-1] = self.input_ids[:, 1:].masked_fill(~self.mask[:, 1:], IGNORED)
        return replace(self, labels=labels)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def mapped(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return None if value is None else change(value)

        return Batch(**{name: mapped(value) for name, value in vars(self).items()})

    def inputs(self) -> dict[str, Any]:
        """Return keyword arguments for a model of transformers with eager or sdpa attention.

        Without mask and cache, transformers separates packed documents where positions start again. OPT is the
        exception: it needs `attention_mask` besides.
        """
        if self.attention_mask is not None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.document is not None:
            inputs["position_ids"] = self.position_ids
        return inputs


class Row(NamedTuple):
    """Consecutive tokens (n,) of a stream, and `starts` (n,), True where a document begins."""

    ids: NDArray[Any]
    starts: NDArray[np.bool_]


def from_rows(
    rows: Sequence[Row], length: int, prefix: Sequence[int], padding: int, respect_documents: bool = False
) -> Batch:
    """Make a batch of pieces of a stream, T = `length` inputs each, with `prefix` where a piece does not begin with it.

    A piece has at most T + 1 - len(prefix) tokens. The piece before it predicted its first token, which is therefore
    not scored after a prefix. `padding` fills short rows.
    """
    windows = np.full((len(rows), length + 1), padding, np.int64)
    starts = np.zeros((len(rows), length + 1), bool)
    sizes = np.zeros(len(rows), np.int64)
    added = np.zeros(len(rows), np.int64)  # prefix tokens added to the row, whose successors are not scored
    for place, row in enumerate(rows):
        front = [] if list(row.ids[: len(prefix)]) == list(prefix) else list(prefix)
        added[place], sizes[place] = len(front), len(front) + len(row.ids)
        windows[place, : len(front)] = front
        windows[place, len(front) : sizes[place]] = row.ids
        starts[place, len(front) : sizes[place]] = row.starts
    tensors = (torch.from_numpy(windows), torch.from_numpy(starts), torch.from_numpy(sizes))
    batch = from_windows(*tensors, respect_documents)
    unscored = torch.arange(length) < torch.from_numpy(added)[:, None]
    return replace(batch, labels=batch.targets.masked_fill(unscored, IGNORED))


def from_windows(windows: Tensor, starts: Tensor, sizes: Tensor, respect_documents: bool) -> Batch:
    """Make a batch of rows of T + 1 consecutive tokens: T inputs, and the T tokens after them as labels.

    windows (B, T + 1) int64 · starts (B, T + 1) bool, True where a document begins · sizes (B,): tokens before the
    padding. With `respect_documents` the last token of a document does not predict the first one of the next.
    """
    length = windows.shape[1] - 1
    column = torch.arange(length + 1)
    labels = windows[:, 1:].masked_fill(column[1:] >= sizes[:, None], IGNORED)
    positions = column[:length].expand(len(windows), length)
    if not respect_documents:
        return Batch(windows[:, :length], labels=labels, position_ids=positions)
    labels = labels.masked_fill(starts[:, 1:], IGNORED)
    begins = starts[:, :length] & (column[:length] > 0)
    first = torch.where(begins, positions, 0).cummax(1).values
    document = begins.cumsum(1)
    return Batch(windows[:, :length], labels=labels, position_ids=positions - first, document=document)
