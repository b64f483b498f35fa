"""`Batch`: rows of tokens for calibration, training and evaluation alike, and how stretches of a stream become one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens; unless said otherwise int64 and (B, T). None: the default in brackets.

    input_ids
    attention_mask  1, or 0 where a row is padding (no padding)
    labels          language models: the token AFTER each of `input_ids`, aligned already: no shift when scoring; -100
                    is not scored. Separate texts of an encoder: (B,), -100 where a text does not count (nothing is
                    scored: calibration)
    position_ids    from 0 at the start of every document if `document` is given (from 0 in every row)
    document        which document of its row a token belongs to, from 0 (rows are one stretch of text)
    goal            a teacher's predictions, tensors (B, T, ...) by name: see `distill.kl.Goal` (not known)
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    document: Tensor | None = None
    goal: dict[str, Tensor] | None = None

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: True where a token is no padding."""
        mask = self.attention_mask
        return torch.ones_like(self.input_ids, dtype=torch.bool) if mask is None else mask.bool()

    @property
    def targets(self) -> Tensor:
        """Return `labels` of a batch that has them."""
        assert self.labels is not None, "a batch without labels cannot be scored"
        return self.labels

    @property
    def scored(self) -> int:
        """How many tokens, or separate texts, count in the loss."""
        return int((self.targets != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """How many tokens are learnt from."""
        if self.targets.dim() == 2:
            return self.scored
        return int(self.mask[self.targets != IGNORED].sum())

    def unscored(self) -> "Batch":
        """The same without labels: for a process that has nothing to learn from but must take part."""
        return replace(self, labels=torch.full_like(self.targets, IGNORED))

    def to(self, device: torch.device | str) -> "Batch":
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, span: slice) -> "Batch":
        """Some of the rows."""
        return self._mapped(lambda tensor: tensor[span])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def mapped(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return None if value is None else change(value)

        return Batch(**{name: mapped(value) for name, value in vars(self).items()})

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for a model of transformers, eager or sdpa.

        Without mask and cache, transformers takes positions that start again for packed documents and keeps them apart.
        OPT alone does not: it needs `attention_mask` besides.
        """
        if self.attention_mask is not None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.document is not None:
            inputs["position_ids"] = self.position_ids
        return inputs


def attention_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """An additive mask (B, 1, T, T) of `dtype`: causal, and closed between documents.

    Right for eager and sdpa attention of every family. Layers with a sliding window attend to the whole document under
    it, so prefer `Batch.inputs`.
    """
    rows, length = batch.input_ids.shape
    document = batch.document if batch.document is not None else torch.zeros_like(batch.input_ids)
    allowed = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    allowed = allowed & (document[:, :, None] == document[:, None, :])
    mask = torch.zeros(rows, length, length, dtype=dtype, device=document.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


class Row(NamedTuple):
    """Consecutive tokens, and True where a document begins among them, both (n,)."""

    ids: NDArray[Any]
    starts: NDArray[np.bool_]


def from_rows(
    rows: Sequence[Row], length: int, prefix: Sequence[int], padding: int, respect_documents: bool = False
) -> Batch:
    """Stretches of a stream as a batch of T = `length` inputs each, behind `prefix` where they do not begin with it.

    A stretch has at most T + 1 - len(prefix) tokens; its first one was predicted by the stretch before it, and is not
    scored again behind a prefix.
    """
    windows = np.full((len(rows), length + 1), padding, np.int64)
    starts = np.zeros((len(rows), length + 1), bool)
    sizes = np.zeros(len(rows), np.int64)
    given = np.zeros(len(rows), np.int64)  # prefix tokens that the row got, whose successor is not scored
    for place, row in enumerate(rows):
        front = [] if list(row.ids[: len(prefix)]) == list(prefix) else list(prefix)
        given[place], sizes[place] = len(front), len(front) + len(row.ids)
        windows[place, : len(front)] = front
        windows[place, len(front) : sizes[place]] = row.ids
        starts[place, len(front) : sizes[place]] = row.starts
    made = (torch.from_numpy(windows), torch.from_numpy(starts), torch.from_numpy(sizes))
    batch = from_windows(*made, respect_documents)
    unscored = torch.arange(length) < torch.from_numpy(given)[:, None]
    return replace(batch, labels=batch.targets.masked_fill(unscored, IGNORED))


def from_windows(windows: Tensor, starts: Tensor, sizes: Tensor, respect_documents: bool) -> Batch:
    """Rows of T + 1 consecutive tokens as T inputs and the T tokens after them.

    windows (B, T + 1) int64 · starts (B, T + 1) bool: a document begins here · sizes (B,): tokens before the padding.
    With `respect_documents` the last token of a document does not predict the first one of the next.
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
