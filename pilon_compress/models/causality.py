"""Check that a language model's predictions depend on earlier tokens alone; otherwise perplexity means nothing."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput

TOKENS = 12  # length of the sequence that is compared
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative error that rounding explains, by dtype
HALF_TOLERANCE = 3e-2  # of bfloat16 and float16


@torch.no_grad()
def check_causal(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise BadInput if the logits of `model` at earlier positions of `ids` (1, T) change with the last token.

    Some classes that transformers lists as causal look both ways unless they are told otherwise (XLNet, BERT with a
    head for generation).
    """
    ids = ids[:, :TOKENS]
    if ids.shape[1] < 2:
        return
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], (ids[:, 0] + 1) % (int(ids.max()) + 1), ids[:, 0])
    plain, changed = (model(input_ids=one, use_cache=False).logits[:, :-1].double() for one in (ids, other))
    error = float((plain - changed).norm() / plain.norm().clamp_min(1e-30))
    if error > TOLERANCE.get(model.dtype, HALF_TOLERANCE):
        raise BadInput(
            f"{type(model).__name__} looks at later tokens to predict earlier ones, so it has no perplexity: set "
            "is_decoder in config.json if it was trained as a decoder"
        )
