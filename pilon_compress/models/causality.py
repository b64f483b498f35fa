"""Causality: a language model's predictions depend on earlier tokens alone, or their perplexity means nothing."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilon_compress.errors import BadInput

TOKENS = 12  # that are looked at
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF = 3e-2  # half precision


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
    if error > TOLERANCE.get(model.dtype, HALF):
        raise BadInput(
            f"{type(model).__name__} looks at later tokens to predict earlier ones (is_decoder is not set?): it is no "
            "language model whose perplexity could be taken"
        )
