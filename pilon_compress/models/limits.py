"""Find and enforce the longest input that a model takes."""

from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.models.task import text_config


def longest_input(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the model (on any device, meta included) takes at once; None if nothing limits it.

    RoBERTa and its relatives count positions from the padding id + 1 on, so they take fewer than their config states.
    """
    stated: int | None = getattr(text_config(model.config), "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:  # -1: XLNet
        return None
    for name, module in model.base_model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and name.endswith("position_embeddings"):
            return int(stated - padding - 1)
    return stated


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """Raise BadInput if `length` tokens exceed the model's positions; `what` names the option in the message."""
    longest = longest_input(model)
    if longest is not None and length > longest:
        raise BadInput(f"{what} of {length} tokens exceeds the model's {longest} positions")
