"""Generate text with a causal LM: continue a prompt, or answer it by the chat template."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from pilon_compress.config.generation import GenerateConfig
from pilon_compress.config.tiers import n_hot_of
from pilon_compress.data.sequences import check_ids
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.limits import longest_input
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.fold import fold, foldable
from pilon_compress.nn.layout import BANKS

GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}  # arguments of `generate`
ANSWER = "ANSWER"  # a sample answer, to find the end of a turn in a chat template


@dataclass(frozen=True)
class Completion:
    """Generated `text` without prompt and special tokens, and the number of `tokens`, including the one that stops.

    `stop`: "eos", "length" (of max_new_tokens) or "context" (no positions left). `chat`: True if the chat template was
    used.
    """

    text: str
    tokens: int
    stop: str
    chat: bool


@torch.no_grad()
def complete(settings: GenerateConfig, prompt: str, stream: Callable[[str], None] | None = None) -> Completion:
    """Answer `prompt` with the causal LM `settings.model` by its chat template; without one, or if `raw`, continue it.

    Decoding is greedy without temperature; `top_k` or `top_p` alone imply temperature 1. Sampling options of the
    model's generation_config are ignored, but its EOS tokens are used. `stream` is called with every piece of text, and
    first with the prompt if that is continued. Raises BadInput for an encoder, and for a prompt that is empty or does
    not fit.
    """
    if not prompt:
        raise BadInput("the prompt is empty")
    config = checkpoint.load_config(settings.model)
    if not checkpoint.is_causal(config):
        raise BadInput(f"{settings.model} is a {config.model_type} encoder: it does not generate text")
    tokenizer = checkpoint.load_tokenizer(settings.model)
    chat = bool(tokenizer.chat_template) and not settings.raw
    if settings.system is not None and not chat:
        reason = "leave out --raw" if settings.raw else f"{settings.model} has none"
        raise BadInput(f"--system needs a chat template: {reason}")
    ids = chat_ids(tokenizer, prompt, settings.system) if chat else prompt_ids(tokenizer, prompt)
    network = load_to_generate(settings.model, settings.device, n_hot_of(settings.tier))
    check_ids(tokenizer, max(ids), vocabulary(config))
    room = _room(network, len(ids))
    torch.manual_seed(settings.seed)
    stops = stop_tokens(network, tokenizer)
    writer = Writer(tokenizer, stops, stream or (lambda piece: None))
    if stream is not None and not chat:
        stream(prompt)
    added = _generate(network, tokenizer, ids, min(settings.max_new_tokens, room), stops, writer, sampling(settings))
    full = "context" if room < settings.max_new_tokens else "length"
    return Completion(writer.text, len(added), "eos" if added and added[-1] in stops else full, chat)


def load_to_generate(reference: str, device: str, n_hot: float | None = None) -> PreTrainedModel:
    """Load a causal LM in the form that generates fastest: float32 on a CPU, compositions folded. Raises BadInput.

    n_hot: share of each bank's primitives to hold in memory; nothing is folded then
    """
    target = checkpoint.find_device(device)
    dtype = "float32" if target.type == "cpu" else "auto"
    network = checkpoint.load_model(reference, dtype=dtype, device=str(target), n_hot=n_hot)
    if n_hot is None and hasattr(network.base_model, BANKS) and foldable(network):
        fold(network)
    return network


@torch.no_grad()
def continued(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """Return the greedy continuation of `prompt` by a causal LM, without the prompt."""
    stops = stop_tokens(network, tokenizer)
    writer = Writer(tokenizer, stops, lambda piece: None)
    ids = prompt_ids(tokenizer, prompt)
    _generate(network, tokenizer, ids, max_new_tokens, stops, writer, GREEDY)
    return writer.text


def sampling(settings: GenerateConfig) -> dict[str, Any]:
    """Return the arguments of `generate` that choose tokens."""
    temperature = settings.temperature if settings.temperature is not None else 1.0 if settings.narrowed else 0.0
    options = {"do_sample": temperature > 0, "repetition_penalty": float(settings.repetition_penalty)}
    if temperature == 0:
        return options
    return options | {"temperature": temperature, "top_k": settings.top_k or 0, "top_p": settings.top_p or 1.0}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids of a text to continue: prefix, no end. Raises BadInput for no tokens."""
    _check_unicode(prompt)
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    framed = list(tokenizer(prompt)["input_ids"])
    if not plain:
        raise BadInput("the prompt has no token that the tokenizer knows")
    extra = len(framed) - len(plain)
    begins = next((at for at in range(extra + 1) if framed[at : at + len(plain)] == plain), 0)
    before = framed[:begins]
    return plain if before == plain[:begins] else before + plain


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> list[int]:
    """Return the ids of a conversation in which the assistant speaks next. Raises BadInput if the template refuses."""
    _check_unicode(prompt + (system or ""))
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the chat template refuses the prompt ({reason}): use --raw to continue the prompt") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template writes BOS itself


def stop_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a text: EOS of generation_config, config and tokenizer, end of an assistant's turn."""
    stops: set[int] = set()
    configs = (network.generation_config, network.config, network.config.get_text_config(), tokenizer)
    for value in (getattr(config, "eos_token_id", None) for config in configs):
        stops |= set(value) if isinstance(value, list | tuple) else set() if value is None else {value}
    return stops | _turn_end(tokenizer)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the first special token that the chat template puts after an answer, as a set; empty without one."""
    if not tokenizer.chat_template:
        return set()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return set()
    after = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.bos_token_id}
    return set([token for token in after if token in special][:1])


class Writer(BaseStreamer):
    """Decodes tokens while `generate` chooses them, and calls `write` with every piece of text that is final."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: set[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.write = tokenizer, stops, write
        self.ids: list[int] = []
        self.text = self.written = ""
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        """Add chosen tokens; the first call has the prompt, which is skipped."""
        if not self.begun:
            self.begun = True
            return
        self.ids += [int(token) for token in value.flatten() if int(token) not in self.stops]
        self._decode()
        if not self.text.endswith("\ufffd"):  # an incomplete character
            self._flush()

    def end(self) -> None:
        """Write the rest of the text."""
        self._decode()
        self._flush()

    def _decode(self) -> None:
        self.text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _flush(self) -> None:
        if self.text.startswith(self.written) and len(self.text) > len(self.written):
            self.write(self.text[len(self.written) :])
            self.written = self.text


def _generate(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    count: int,
    stops: set[int],
    writer: Writer,
    options: dict[str, Any],
) -> list[int]:
    """Return the ids generated after `ids`. All options that generation_config might set are given explicitly."""
    stop = sorted(stops)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop or [0])[0]
    inputs = torch.tensor([ids], device=network.device)
    model: Any = network
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=count,
        pad_token_id=pad,
        eos_token_id=stop or None,
        num_beams=1,
        num_return_sequences=1,
        streamer=writer,
        **options,
    )
    return [int(token) for token in out[0, len(ids) :]]


def _room(network: PreTrainedModel, used: int) -> int:
    """Return the number of positions after the prompt. Raises BadInput if there are none."""
    longest = longest_input(network)
    if not longest:
        return 2**31
    if used >= longest:
        raise BadInput(
            f"the prompt has {used} tokens, but the model has {longest} positions for prompt and answer: shorten it"
        )
    return int(longest) - used


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the prompt is not UTF-8 text") from None
