"""How long an input may be."""

from transformers import PreTrainedModel

from pilon_compress.errors import BadInput
from pilon_compress.models.task import text_config


def longest_input(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the model takes at once (on any device, meta included); None if nothing limits it.

    RoBERTa and its kin count positions from the padding id + 1 on: their config promises more than they can take.
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
    """Raise BadInput for inputs of more tokens than the model has positions for; `what` names the option."""
    longest = longest_input(model)
    if longest is not None and length > longest:
        raise BadInput(f"{what} of {length} tokens exceeds the model's {longest} positions")
