"""Text from a causal LM: what it adds to a prompt, or answers to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from pilon_compress.config.generation import GenerateConfig
from pilon_compress.data.sequences import check_ids
from pilon_compress.errors import BadInput
from pilon_compress.models import checkpoint
from pilon_compress.models.limits import longest_input
from pilon_compress.models.task import vocabulary
from pilon_compress.nn.fold import fold, foldable
from pilon_compress.nn.layout import BANKS

GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}  # arguments of `generate`
ANSWER = "ANSWER"  # what an assistant says, where the end of a turn is looked for in a chat template


@dataclass(frozen=True)
class Completion:
    """`text` without prompt and special tokens; `tokens` that were generated, the one that stops among them.

    `stop`: "eos", "length" (of max_new_tokens) or "context" (no positions are left). `chat`: by the chat template.
    """

    text: str
    tokens: int
    stop: str
    chat: bool


@torch.no_grad()
def complete(asked: GenerateConfig, prompt: str, stream: Callable[[str], None] | None = None) -> Completion:
    """Let the causal LM `asked.model` answer `prompt` by its chat template or, without one or if `raw`, continue it.

    Decoding is greedy unless there is a temperature; `top_k` or `top_p` alone imply temperature 1. The sampling options
    of the model's generation_config are not used, its EOS tokens are. `stream` is called with the prompt, where it is
    continued, and with every piece of text behind it.
    Raises BadInput for an encoder, and for a prompt that is empty or does not fit.
    """
    if not prompt:
        raise BadInput("the prompt is empty")
    model, raw, system, device = asked.model, asked.raw, asked.system, asked.device
    config = checkpoint.load_config(model)
    if not checkpoint.is_causal(config):
        raise BadInput(f"{model} is a {config.model_type} encoder: it does not generate text")
    tokenizer = checkpoint.load_tokenizer(model)
    chat = bool(tokenizer.chat_template) and not raw
    if system is not None and not chat:
        raise BadInput("--system needs a chat template: " + ("leave out --raw" if raw else f"{model} has none"))
    ids = chat_ids(tokenizer, prompt, system) if chat else prompt_ids(tokenizer, prompt)
    where = checkpoint.find_device(device)
    network = checkpoint.load_model(model, dtype="float32" if where.type == "cpu" else "auto", device=str(where))
    check_ids(tokenizer, max(ids), vocabulary(config))
    room = _room(network, len(ids))
    if hasattr(network.base_model, BANKS) and foldable(network):
        fold(network)
    torch.manual_seed(asked.seed)
    stops = stop_tokens(network, tokenizer)
    writer = Writer(tokenizer, stops, stream or (lambda piece: None))
    if stream is not None and not chat:
        stream(prompt)
    added = _generate(network, tokenizer, ids, min(asked.max_new_tokens, room), stops, writer, sampling(asked))
    full = "context" if room < asked.max_new_tokens else "length"
    return Completion(writer.text, len(added), "eos" if added and added[-1] in stops else full, chat)


@torch.no_grad()
def continued(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> str:
    """Return what a causal LM adds to `prompt`, greedily."""
    stops = stop_tokens(network, tokenizer)
    writer = Writer(tokenizer, stops, lambda piece: None)
    ids = prompt_ids(tokenizer, prompt)
    _generate(network, tokenizer, ids, max_new_tokens, stops, writer, GREEDY)
    return writer.text


def sampling(asked: GenerateConfig) -> dict[str, Any]:
    """Return the arguments of `generate` that choose tokens."""
    temperature = asked.temperature if asked.temperature is not None else 1.0 if asked.narrowed else 0.0
    options = {"do_sample": temperature > 0, "repetition_penalty": float(asked.repetition_penalty)}
    if temperature == 0:
        return options
    return options | {"temperature": temperature, "top_k": asked.top_k or 0, "top_p": asked.top_p or 1.0}


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids of a text to continue: begun as the tokenizer begins sequences, ended by nothing."""
    _check_unicode(prompt)
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(prompt)["input_ids"])
    if not plain:
        raise BadInput("the prompt has no token that the tokenizer knows")
    extra = len(whole) - len(plain)
    begins = next((at for at in range(extra + 1) if whole[at : at + len(plain)] == plain), 0)
    before = whole[:begins]
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
        raise BadInput(f"the chat template refuses the prompt ({reason}): --raw continues it as it stands") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template writes BOS itself


def stop_tokens(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every token that ends a text: EOS of generation_config, config and tokenizer, end of an assistant turn."""
    found: set[int] = set()
    configs = (network.generation_config, network.config, network.config.get_text_config(), tokenizer)
    for value in (getattr(config, "eos_token_id", None) for config in configs):
        found |= set(value) if isinstance(value, list | tuple) else set() if value is None else {value}
    return found | _turn_end(tokenizer)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The first special token that the chat template puts behind what an assistant says."""
    if not tokenizer.chat_template:
        return set()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return set()
    behind = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.bos_token_id}
    return set([token for token in behind if token in special][:1])


class Writer(BaseStreamer):
    """Decodes tokens as `generate` chooses them; `write` gets every piece of text once it no longer changes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: set[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.write = tokenizer, stops, write
        self.ids: list[int] = []
        self.text = self.written = ""
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        if not self.begun:  # the prompt
            self.begun = True
            return
        self.ids += [int(token) for token in value.flatten() if int(token) not in self.stops]
        self._decode()
        if not self.text.endswith("\ufffd"):  # half a character
            self._flush()

    def end(self) -> None:
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
    """Return the ids behind `ids`. Options that generation_config may hold are set, so that it switches nothing on."""
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
    """Positions behind the prompt. Raises BadInput if there are none."""
    longest = longest_input(network)
    if not longest:
        return 2**31
    if used >= longest:
        raise BadInput(f"the prompt has {used} tokens, the model has {longest} positions for prompt and answer")
    return int(longest) - used


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the prompt is not UTF-8 text") from None
