"""Tokenise conversations for fine-tuning with the tokenizer's chat template; the assistant's tokens are scored."""

import json
import os
import re
from collections.abc import Iterator
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pilon_compress.data import text
from pilon_compress.data.split import split_items
from pilon_compress.data.token_files import PARTS, Part, TokenFile, TokenizedDocument, cached, described, fingerprint
from pilon_compress.errors import BadInput

COLUMNS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
MARKED = re.compile(r"{%-?\s*generation\s*-?%}")  # in templates that mark the assistant's tokens themselves
RENAMED = ("from", "value")  # columns that `_message` renames to role and content

Message = dict[str, Any]
Span = tuple[int, int]


def tokenise_chat(source: str, tokenizer: PreTrainedTokenizerBase, part: Part, folder: Path | None = None) -> TokenFile:
    """Return a token file of the conversations of a source, each a document; cached like that of `tokenise`.

        hub:REPO:CONFIG:SPLIT[:COLUMN]    a dataset on the hub; CONFIG may be empty
        FILE or GLOB [::COLUMN]           .jsonl, .json, .parquet

    COLUMN is `messages` or `conversations` unless named, and holds lists of {role, content} or {from, value}. The
    tokens that an assistant's turn adds to the prompt before it are scored, including the end of the turn; a first turn
    is not scored. A conversation without scored turns, or one that the template refuses, is an empty document. A prompt
    is in `train` or `validation` with all its answers. Raises BadInput for a source that cannot be read, and for a
    tokenizer without chat template.
    """
    if not tokenizer.chat_template:
        raise BadInput("the tokenizer has no chat template, which conversations need: name one with --chat-template")
    if not tokenizer.is_fast:
        raise BadInput(f"{type(tokenizer).__name__} gives no character offsets of its tokens: use a fast tokenizer")
    state = fingerprint(tokenizer) + json.dumps(tokenizer.chat_template)
    about = described("chat", source, tokenizer, part, blake2b(state.encode(), digest_size=16).hexdigest())
    return cached(about, _items(source, tokenizer, part), folder)


def _items(source: str, tokenizer: PreTrainedTokenizerBase, part: Part) -> Iterator[TokenizedDocument]:
    """Yield the documents of the source. Raises BadInput if no conversation has scored tokens."""
    count = scored = 0
    refusal = ""
    rendering = Rendering(tokenizer)

    def conversations() -> Iterator[tuple[str, list[Message]]]:
        nonlocal count
        table, column = _table(source)
        for where, row in text.open_rows(table):
            count += 1
            yield where, _messages(row, column, where)

    for where, messages in split_items(conversations(), lambda item: _prompt(item[1]), PARTS[part]):
        items = []
        try:
            items = rendering.documents(messages)
        except (TemplateError, TypeError, ValueError) as error:
            refusal = refusal or f"; {where} does not fit the chat template: {str(error).splitlines()[0]}"
        scored += len(items)
        yield from items or [TokenizedDocument([], 0, [])]
    if not scored:
        which = "none" if part == "all" else f"none of the {part} part"
        raise BadInput(f"{source} holds {count} conversations, but {which} in which an assistant answers{refusal}")


def _table(source: str) -> tuple[str, str | None]:
    """Split a source into the argument of `text.open_rows` and the column name after it, or None."""
    split = text.source_of(source).column
    return (source, None) if split is None else split(source)


def _messages(row: dict[str, Any], column: str | None, where: str) -> list[Message]:
    name = column or next((name for name in COLUMNS if name in row), None)
    if name is None or name not in row:
        raise BadInput(f"{where} has no column {column or ' or '.join(COLUMNS)}; it has {', '.join(row)}")
    messages = row[name]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadInput(f"{where} holds no list of messages in {name}")
    return [_message(message, where) for message in messages]


def _message(message: Message, where: str) -> Message:
    """Return a message with `role` and `content`, without None values, which tables fill in. Raises BadInput."""
    message = {name: value for name, value in message.items() if value is not None}
    role, content = (message.get(name, message.get(other)) for name, other in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or content is None and "tool_calls" not in message:
        raise BadInput(f"{where} has a message without role and content (or from and value)")
    rest = {name: value for name, value in message.items() if name not in RENAMED}
    return rest | {"role": ROLES.get(role, role), "content": content or ""}


def _prompt(messages: list[Message]) -> str:
    return json.dumps(list(takewhile(lambda message: message["role"] != "assistant", messages)), sort_keys=True)


class Rendering:
    """Renders conversations with a tokenizer's chat template and finds the assistant's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.marked = MARKED.search(tokenizer.get_chat_template()) is not None
        self.special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def documents(self, messages: list[Message]) -> list[TokenizedDocument]:
        """Return a conversation as documents with scored answers; [] if no assistant answers.

        It is one document, unless the template renders an earlier turn differently from the last one (for example
        without its reasoning): then each answer is a document with the prompt that precedes it. Raises TemplateError
        if the template refuses the conversation.
        """
        if not any(message["role"] == "assistant" for message in messages[1:]):
            return []
        if self.marked:
            out = self.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
            scored = [bool(mark) for mark in out["assistant_masks"]]
            return [self._item(out["input_ids"], scored, self._text(messages), messages[-1]["role"] == "assistant")]
        items = []
        for rendered, spans in self._answers(messages):
            out = self.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            begins = [begin for begin, _ in out["offset_mapping"]]
            scored = [any(first <= begin < last for first, last in spans) for begin in begins]
            items.append(self._item(out["input_ids"], scored, rendered, spans[-1][1] == len(rendered)))
        return items

    def _text(self, messages: list[Message], prompt: bool = False) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def _answers(self, messages: list[Message]) -> list[tuple[str, list[Span]]]:
        """Return rendered texts and the assistant's character spans: of the conversation, or up to each answer."""
        answers = []
        for turn, message in enumerate(messages):
            if turn and message["role"] == "assistant":
                before, after = self._text(messages[:turn]), self._text(messages[: turn + 1])
                start = len(os.path.commonprefix([self._text(messages[:turn], prompt=True), after]))
                if start < len(before) or not after.startswith(before):
                    raise TemplateError("it rewrites the text before an answer; mark answers with {% generation %}")
                answers.append((after, (start, len(after))))
        rendered = self._text(messages)
        if all(rendered.startswith(after) for after, _ in answers):
            return [(rendered, [span for _, span in answers])]
        return [(after, [span]) for after, span in answers]

    def _item(self, ids: list[int], scored: list[bool], rendered: str, answered: bool) -> TokenizedDocument:
        """Return a document; score the end of each turn, and append EOS where the template ends no turn."""
        ids, scored = list(ids), list(scored)
        ended = False
        for place, token in enumerate(ids):
            if scored[place]:
                ended = token in self.special or (ended and scored[place - 1])
            elif place and scored[place - 1] and not ended and token in self.special:
                scored[place] = ended = True
        if answered and any(scored) and not ended:
            ids, scored = [*ids, self.tokenizer.eos_token_id], [*scored, True]
        return TokenizedDocument(ids, len(rendered.encode()), scored)
