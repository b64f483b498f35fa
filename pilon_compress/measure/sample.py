"""Text from a causal LM, for a first look at what a conversion left."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilon_compress import checkpoint
from pilon_compress.errors import BadInput
from pilon_compress.form.fold import fold, foldable
from pilon_compress.form.layout import BANKS


@torch.no_grad()
def continue_text(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> str:
    """The continuation of `prompt`, without it; greedy at temperature 0. Raises BadInput for an encoder."""
    config = checkpoint.load_config(model)
    if not checkpoint.is_causal(config):
        raise BadInput(f"{model} is a {config.model_type} encoder: it does not generate text")
    tokenizer = checkpoint.load_tokenizer(model)
    where = checkpoint.find_device(device)
    network = checkpoint.load_model(model, dtype="float32" if where.type == "cpu" else "auto", device=str(where))
    if hasattr(network.base_model, BANKS) and foldable(network):
        fold(network)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    return continued(network, tokenizer, prompt, max_new_tokens, **sampling)


@torch.no_grad()
def continued(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, **sampling: Any
) -> str:
    """What a causal LM adds to `prompt`, greedily unless `sampling` says otherwise."""
    encoded = tokenizer(prompt, return_tensors="pt").to(network.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model: Any = network
    out = model.generate(
        encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        **({"do_sample": False} | sampling),
    )
    return str(tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
