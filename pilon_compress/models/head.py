"""The language-model head: logits from last hidden states, as the model itself computes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.models.task import text_config, vocabulary
from pilon_compress.nn.functional import soft_capped

ROWS = 2  # states that tell a head that is the output embedding alone from others
TOLERANCE = 1e-3


class Head:
    """`head(hidden)`: logits (N, V) float32 of last hidden states (N, d).

    Mostly the output embedding and a soft cap, `is_plain`. Where the model's own code does more (Granite and Cohere
    scale logits, decoders of the BERT kind transform the states first), that code runs, on states that stand in for its
    base model's. Raises BadInput for a model whose logits are neither.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.matrix = model, model.get_output_embeddings()
        self.cap: float | None = getattr(text_config(model.config), "final_logit_softcapping", None)
        self.out_features = vocabulary(model.config)
        self.is_plain = isinstance(self.matrix, nn.Linear) and self._fits(self.matrix)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._plain(hidden) if self.is_plain else self._own(hidden)[0]

    def _plain(self, hidden: Tensor) -> Tensor:
        return soft_capped(self.matrix(hidden).float(), self.cap)

    @torch.no_grad()
    def _fits(self, matrix: nn.Linear) -> bool:
        """True if output embedding and cap give the model's own logits."""
        hidden = torch.randn(ROWS, matrix.in_features, generator=torch.Generator().manual_seed(0)).to(matrix.weight)
        with _evaluating(self.model):
            own, used = self._own(hidden)
            if not used:  # OPT calls a part of its base model
                hidden = self.model.base_model(**_words(ROWS, hidden.device)).last_hidden_state[0]
        plain = self._plain(hidden)
        fits = own.shape == plain.shape and float((own - plain).norm()) <= TOLERANCE * float(own.norm())
        if not used and not fits:
            raise BadInput(f"{type(self.model).__name__} computes its logits in a way that cannot be followed")
        return fits

    def _own(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """Run the model's forward with a stand-in for its base model's that returns `hidden`, and tell if it did."""
        used, base = False, self.model.base_model

        def stand_in(*_args: Any, **_kwargs: Any) -> _States:
            nonlocal used
            used = True
            return _States((hidden[None],))

        base.forward = stand_in
        try:
            logits: Tensor = self.model(**_words(len(hidden), hidden.device)).logits
        finally:
            del base.forward
        return logits[0].float(), used


class _States(tuple[Tensor]):
    """A base model's output that has last hidden states and nothing else, whatever is looked up."""

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[0] if name == "last_hidden_state" else None


def _words(count: int, device: torch.device) -> dict[str, Any]:
    return {"input_ids": torch.zeros(1, count, dtype=torch.long, device=device), "use_cache": False}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and without what modules do when their mode is set."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
