"""Record inputs and outputs of feed-forward blocks, and gradients by which the price of another output is estimated.

    g    gradient, by the block's output at one token, of -log p of labels that are drawn from the model's own
         predictions, summed over all of the sequence
    δ    a change of that output
    ½ E (g · δ)²    second-order estimate of KL(before ‖ after), summed over all predictions that the token reaches

Labels of different positions are independent and gradients have mean zero, so one backward pass prices every block at
every token (a diagonal of the Fisher matrix in the direction δ).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.data.batch import IGNORED, Batch
from pilon_compress.io.progress import track
from pilon_compress.io.tensor_store import TensorStore
from pilon_compress.models.head import Head
from pilon_compress.nn.functional import rows_at_once

DRAWS = 2  # of labels, hence backward passes
STORED = torch.bfloat16


def valid_tokens(batch: Batch) -> Tensor:
    """Return (B, T) bool: True up to the last token of each row that is scored; behind it there is padding."""
    scored = batch.targets != IGNORED
    return scored.flip(1).cummax(1).values.flip(1)


class Recorder:
    """Records of the blocks `names` of `model` on some batches, kept in `store`: see `of`."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], store: TensorStore, seed: int) -> None:
        self.model, self.names, self.store, self.head = model, list(names), store, Head(model)
        self.generator = torch.Generator(model.device).manual_seed(seed)
        self.batches, self.tokens = 0, 0
        self._seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def record(self, batches: Iterable[Batch]) -> None:
        """Run the batches, a few rows at a time, and store what every block sees and makes of it."""
        modules = [(name, self.model.base_model.get_submodule(name)) for name in self.names]
        hooks = [module.register_forward_hook(self._hook(name)) for name, module in modules]
        try:
            for batch in track(list(batches), "pricing blocks"):
                rows = rows_at_once(batch.input_ids.shape[1] * self.head.out_features, 2)
                for start in range(0, len(batch.input_ids), rows):
                    self._run(batch.rows(slice(start, start + rows)).to(self.model.device))
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the records of one block, float32: inputs and outputs (N, d), gradients (DRAWS, N, d)."""
        parts = [[self.store.take(f"{name}.{part}.{index}") for index in range(self.batches)] for part in "xyg"]
        return torch.cat(parts[0]).float(), torch.cat(parts[1]).float(), torch.cat(parts[2], 1).float()

    def _hook(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor], made: Tensor) -> Tensor:
            change = torch.zeros_like(made, requires_grad=True)
            self._seen[name] = (args[0].detach(), made.detach(), change)
            return made + change

        return hook

    @torch.enable_grad()
    def _run(self, batch: Batch) -> None:
        valid = valid_tokens(batch)
        hidden = self.model.base_model(**batch.inputs()).last_hidden_state
        pulls = self._pulls(hidden.detach()[valid])
        changes = [self._seen[name][2] for name in self.names]
        found: list[list[Tensor]] = []
        for draw, pull in enumerate(pulls):
            back = torch.zeros_like(hidden)
            back[valid] = pull
            found.append(list(torch.autograd.grad(hidden, changes, back, retain_graph=draw < len(pulls) - 1)))
        for place, name in enumerate(self.names):
            x, y, _ = self._seen.pop(name)
            gradients = torch.stack([one[place][valid] for one in found])
            for part, tensor in (("x", x[valid]), ("y", y[valid]), ("g", gradients)):
                self.store.put(f"{name}.{part}.{self.batches}", tensor.to(STORED))
        self.batches += 1
        self.tokens += int(valid.sum())

    def _pulls(self, hidden: Tensor) -> list[Tensor]:
        """Gradients (N, d) of -log p of drawn labels by the last hidden states (N, d), one for each draw."""
        pulls = [torch.empty_like(hidden) for _ in range(DRAWS)]
        rows = rows_at_once(self.head.out_features, 2)
        for start in range(0, len(hidden), rows):
            span = slice(start, start + rows)
            states = hidden[span].requires_grad_()
            log_p = self.head(states).float().log_softmax(-1)
            for draw, pull in enumerate(pulls):
                labels = torch.multinomial(log_p.detach().exp(), 1, generator=self.generator)
                total = -log_p.gather(1, labels).sum()
                (pull[span],) = torch.autograd.grad(total, states, retain_graph=draw < DRAWS - 1)
        return pulls
