"""Running a model as a whole on one batch: its base, its head, its embeddings."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models.task import text_config
from pilon_compress.nn.functional import mean_pooled


def run_base(model: PreTrainedModel, batch: Batch, device: torch.device | None = None) -> Any:
    """Run the base model (no head) on one batch without a key-value cache, and return its output."""
    no_cache = {"use_cache": False} if getattr(text_config(model.config), "use_cache", None) is not None else {}
    device = device or model.device
    # on the meta device, code that inspects the mask's values fails
    mask = {} if device.type == "meta" else {"attention_mask": batch.mask.long().to(device)}
    return model.base_model(input_ids=batch.input_ids.to(device), **mask, **no_cache)


def last_states(model: PreTrainedModel, batch: Batch, device: torch.device | None = None) -> Tensor:
    """Return the last hidden states (B, T, d) of one batch. Raises BadInput for a model that returns none."""
    states: Tensor | None = getattr(run_base(model, batch, device), "last_hidden_state", None)
    if states is None:
        raise BadInput(
            f"the base model of {type(model).__name__} returns no last hidden states: it cannot be converted"
        )
    return states


def embeddings(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return embeddings (B, d), float32, of the texts of one batch: means of the last hidden states over tokens."""
    states = last_states(model, batch)
    return mean_pooled(states.float(), batch.mask.to(states.device))


def run_head(model: PreTrainedModel, batch: Batch, device: torch.device | None = None) -> Tensor:
    """Return the logits (B, T, V) of one batch, computed without a key-value cache."""
    device = device or model.device
    ids, mask = batch.input_ids.to(device), batch.mask.long().to(device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits
