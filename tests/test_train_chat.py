"""Conversations: scored is what the assistant says and where it stops, nothing else; none sees another."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pilon_compress.data.batch import IGNORED
from pilon_compress.data.chat import Rendering, tokenise_chat
from pilon_compress.data.loader import Loader
from pilon_compress.data.packed_dataset import PackedDataset, best_fit
from pilon_compress.errors import BadInput

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
) + PROMPT
MARKED_TO_THE_END = MARKED.replace("{% endgeneration %}{% else", "<|im_end|>{% endgeneration %}{% else").replace(
    "{{ m.content }}{% endif %}<|im_end|>", "{{ m.content }}<|im_end|>{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PLAIN += "{% if add_generation_prompt %}assistant: {% endif %}"
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
) + PROMPT
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with\nthe user') }}{% endif %}" + CHATML
REWRITES = "{{ messages | length }}" + CHATML

TURNS = [
    ("system", "Be brief."),
    ("user", "Hi, naïve one"),
    ("assistant", "Hello!"),
    ("user", "Bye"),
    ("assistant", "Ciao"),
]


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def questions(count):
    return [chat(("user", f"question {i}"), ("assistant", f"answer {i} " + "y" * (i * 7 % 40))) for i in range(count)]


@pytest.fixture
def tokenizer(tiny):
    made = tiny.tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


def write(path, conversations, column="messages"):
    rows = [{"id": i, column: messages} for i, messages in enumerate(conversations)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def scored_texts(item, tokenizer):
    """The stretches that are scored, as text."""
    edges = np.flatnonzero(np.diff([False, *item.scored, False]))
    return [tokenizer.decode(item.ids[first:last]) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def scored_labels(batch, tokenizer):
    return [tokenizer.decode([label for label in row if label != IGNORED]) for row in batch.labels.tolist()]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["Hello!<|im_end|>\n", "Ciao<|im_end|>\n"]),
        (MARKED, ["Hello!<|im_end|>", "Ciao<|im_end|>"]),
        (MARKED_TO_THE_END, ["Hello!<|im_end|>", "Ciao<|im_end|>"]),
        (PLAIN, ["Hello!\n", "Ciao\n<eos>"]),
    ],
)
def test_the_assistants_turns_and_their_ends_are_scored(tokenizer, template, expected):
    tokenizer.chat_template = template
    (item,) = Rendering(tokenizer).documents(chat(*TURNS))
    assert scored_texts(item, tokenizer) == expected
    rendered = tokenizer.apply_chat_template(chat(*TURNS), tokenize=False)
    assert tokenizer.decode(item.ids).removesuffix("<eos>") == rendered
    assert item.utf8_bytes == len(rendered.encode())


def test_what_stands_before_a_scored_turn_is_what_generation_will_see(tokenizer):
    (item,) = Rendering(tokenizer).documents(chat(*TURNS))
    for turn in (2, 4):
        prompt = tokenizer.apply_chat_template(chat(*TURNS[:turn]), add_generation_prompt=True, return_dict=False)
        assert item.ids[: len(prompt)] == prompt and not item.scored[len(prompt) - 1] and item.scored[len(prompt)]


def test_a_question_without_answer_at_the_end_teaches_nothing(tokenizer):
    for template in (CHATML, MARKED, PLAIN):
        tokenizer.chat_template = template
        (item,) = Rendering(tokenizer).documents(chat(*TURNS, ("user", "Hm?")))
        assert len(scored_texts(item, tokenizer)) == 2 and not item.scored[-1]
        assert item.ids[-1] != tokenizer.eos_token_id


def test_a_template_that_shortens_earlier_turns_gives_one_document_per_answer(tokenizer):
    tokenizer.chat_template = THINKING
    first, second = Rendering(tokenizer).documents(chat(*TURNS))
    assert scored_texts(first, tokenizer) == ["<think></think>Hello!<|im_end|>\n"]
    assert scored_texts(second, tokenizer) == ["<think></think>Ciao<|im_end|>\n"]
    assert "assistant\nHello!<|im_end|>" in tokenizer.decode(second.ids), "as the template shows it once it is over"


def test_an_assistant_that_speaks_first_is_context(tokenizer):
    (item,) = Rendering(tokenizer).documents(chat(("assistant", "Welcome"), *TURNS[1:3]))
    assert scored_texts(item, tokenizer) == ["Hello!<|im_end|>\n"]
    assert Rendering(tokenizer).documents(chat(("assistant", "Welcome"), ("user", "Hi"))) == []


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_format_and_both_spellings_give_the_same(tokenizer, tmp_path, suffix):
    plain = questions(6)
    spoken = {"user": "human", "assistant": "gpt"}
    shared = [[{"from": spoken[m["role"]], "value": m["content"]} for m in messages] for messages in plain]
    sources = [
        write(tmp_path / f"a.{suffix}", plain),
        write(tmp_path / f"b.{suffix}", shared, "conversations"),
        write(tmp_path / f"c.{suffix}", plain, "talk") + "::talk",
    ]
    files = [tokenise_chat(source, tokenizer, "all", tmp_path / "cache") for source in sources]
    for file in files:
        assert np.array_equal(file.ids, files[0].ids) and np.array_equal(file.scored, files[0].scored)
    pieces = np.split(np.asarray(files[0].ids), files[0].starts[1:])
    assert [tokenizer.decode(piece) for piece in pieces] == [
        tokenizer.apply_chat_template(messages, tokenize=False) for messages in plain
    ]


def test_rows_may_have_columns_of_their_own(tokenizer, tmp_path):
    tools = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "tool_calls": [{"name": "add"}]}]
    more = [*tools, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "Four."}]
    file = tokenise_chat(write(tmp_path / "t.jsonl", [*questions(3), more]), tokenizer, "all", tmp_path)
    assert file.about.documents == 4 and "Four." in tokenizer.decode(file.ids)


def test_a_hub_dataset(hub, tokenizer, tmp_path):
    folder = hub.root / "datasets" / "some" / "talk"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", questions(5))
    card = "configs:\n- config_name: small\n  data_files:\n  - split: train\n    path: train.jsonl\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from pilon_compress.errors import BadInput
from pilon_compress.data.chat import tokenise_chat
for source in sys.argv[3:]:
    try:
        file = tokenise_chat(source, AutoTokenizer.from_pretrained(sys.argv[1]), "all", Path(sys.argv[2]))
        print(file.about.documents)
    except BadInput as error:
        print(error)
"""
    asked = ("hub:some/talk:small:train", "hub:some/talk::train:messages", "hub:some/talk::train:talk", "hub:some/talk")
    lines = hub.run("-c", code, str(tmp_path / "tokenizer"), str(tmp_path), *asked).stdout.splitlines()
    assert lines[:2] == ["5", "5"]
    assert "row 1, has no column talk; it has id, messages" in lines[2] and "hub:REPO:CONFIG:SPLIT" in lines[3]


def test_parts_are_disjoint_and_keep_the_answers_to_one_prompt_together(tokenizer, tmp_path):
    twice = [chat(*((m["role"], m["content"]) for m in c[:1]), ("assistant", "otherwise")) for c in questions(40)]
    source = write(tmp_path / "t.jsonl", questions(40) + twice)
    texts = {}
    for part in ("train", "validation", "all"):
        file = tokenise_chat(source, tokenizer, part, tmp_path / "cache")
        texts[part] = [tokenizer.decode(piece) for piece in np.split(np.asarray(file.ids), file.starts[1:])]
    assert sorted(texts["train"] + texts["validation"]) == sorted(texts["all"])
    prompts = {part: {text.split("<|im_end|>")[0] for text in texts[part]} for part in texts}
    assert prompts["validation"] and not prompts["train"] & prompts["validation"]


def test_files_depend_on_the_template(tokenizer, tmp_path):
    source = write(tmp_path / "t.jsonl", questions(3))
    first = tokenise_chat(source, tokenizer, "all", tmp_path / "cache")
    before = (first.folder / "tokens.bin").stat().st_mtime_ns
    assert tokenise_chat(source, tokenizer, "all", tmp_path / "cache").folder == first.folder
    assert (first.folder / "tokens.bin").stat().st_mtime_ns == before
    (first.folder / "scored.bin").write_bytes(b"")
    assert len(tokenise_chat(source, tokenizer, "all", tmp_path / "cache").scored) == len(first)
    tokenizer.chat_template = PLAIN
    assert tokenise_chat(source, tokenizer, "all", tmp_path / "cache").folder != first.folder


def test_packing_fills_blocks_and_loses_nothing():
    sizes = [int(size) for size in np.random.default_rng(0).integers(2, 33, 500)]
    groups = best_fit(sizes, 64)
    assert sorted(index for group in groups for index in group) == list(range(500))
    assert all(sum(sizes[index] for index in group) <= 64 for group in groups)
    assert len(groups) <= 1.02 * sum(sizes) / 64 + 1, "little is padding"
    assert best_fit([3, 4, 5, 4], 8) == [[2, 0], [1, 3]]


def test_blocks_hold_every_conversation_once_and_apart(tokenizer, tmp_path):
    file = tokenise_chat(write(tmp_path / "t.jsonl", questions(40)), tokenizer, "all", tmp_path)
    blocks = PackedDataset(file, 200)
    assert blocks.dropped == blocks.cut == 0 and len(blocks) < 40
    found = []
    for row in range(len(blocks)):
        batch = blocks.batch([row])
        assert batch.input_ids.shape == (1, 200)
        for document in batch.document[0].unique():
            at = batch.document[0] == document
            assert batch.position_ids[0, at].tolist() == list(range(int(at.sum())))
            if (batch.labels[0, at] != IGNORED).any():
                ids, labels = batch.input_ids[0, at].tolist(), batch.labels[0, at].tolist()
                found.append((tokenizer.decode(ids), tokenizer.decode([x for x in labels if x != IGNORED])))
    expected = [(m[1]["content"] + "<|im_end|>\n") for m in questions(40)]
    assert sorted(labels for _, labels in found) == sorted(expected)
    assert all(answer[:-1] in document for document, answer in found)


def test_a_conversation_does_not_depend_on_those_packed_beside_it(tiny, tokenizer, tmp_path):
    blocks = PackedDataset(tokenise_chat(write(tmp_path / "t.jsonl", questions(8)), tokenizer, "all", tmp_path), 250)
    model = tiny.tiny_model("llama", vocab_size=len(tokenizer))
    batch = blocks.batch([0])
    assert int(batch.document.max()) > 1
    at = batch.document[0] == 1
    with torch.no_grad():
        packed_logits = model(**batch.inputs()).logits[0, at]
        alone = model(batch.input_ids[:, at]).logits[0]
    assert torch.allclose(packed_logits, alone, atol=1e-5)


def test_long_conversations_are_cut_at_the_right_and_those_left_without_answer_dropped(tokenizer, tmp_path):
    long = [
        chat(("user", "q"), ("assistant", "a" * 100), ("user", "r"), ("assistant", "b" * 100)),
        chat(("user", "u" * 200), ("assistant", "never seen")),
        chat(("user", "no answer")),
        chat(("user", "short"), ("assistant", "fine")),
    ]
    file = tokenise_chat(write(tmp_path / "t.jsonl", long), tokenizer, "all", tmp_path)
    blocks = PackedDataset(file, 80)
    assert (len(blocks), blocks.dropped, blocks.cut) == (2, 2, 1)
    labels = scored_labels(blocks.batch(range(2)), tokenizer)
    prompt = len(tokenizer.apply_chat_template(long[0][:1], add_generation_prompt=True, return_dict=False))
    assert labels == ["a" * (81 - prompt), "fine<|im_end|>\n"], "81 tokens are 80 inputs and the last label"
    with pytest.raises(BadInput, match="no answer begins within the first 5 tokens"):
        PackedDataset(file, 5)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_over_conversations_is_a_function_of_seed_and_step(tokenizer, tmp_path, world):
    file = tokenise_chat(write(tmp_path / "t.jsonl", questions(40)), tokenizer, "all", tmp_path)
    blocks = PackedDataset(file, 100)
    loader = Loader(blocks, 5, seed=1)
    for step in (0, len(blocks) // 5, len(blocks)):
        again = Loader(PackedDataset(file, 100), 5, seed=1)
        shares = [again.batch(step, rank=rank, world=world) for rank in range(world)]
        whole = loader.batch(step)
        assert torch.equal(torch.cat([share.input_ids for share in shares]), whole.input_ids)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        assert sum(share.scored for share in shares) == loader.scored(step)


def test_what_is_no_conversation_is_said_in_one_line(tiny, tokenizer, tmp_path):
    def refused(conversations, *words, column="messages", name="t.jsonl"):
        with pytest.raises(BadInput) as error:
            source = conversations if isinstance(conversations, str) else write(tmp_path / name, conversations, column)
            tokenise_chat(source, tokenizer, "all", tmp_path / "cache")
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)

    good = questions(1)
    refused(good, "t.jsonl, row 1, has no column messages or conversations; it has id, chat", column="chat")
    refused([*good, "hello"], "t.jsonl, row 2, holds no list of messages")
    refused([*good, [{"role": "user"}]], "row 2, has a message without role and content")
    refused([chat(("user", "alone"))], "1 conversations, but none in which an assistant answers")
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"mess')
    refused(str(tmp_path / "bad.jsonl"), "bad.jsonl, line 2, is not JSON")
    (tmp_path / "list.jsonl").write_text("[1, 2]")
    refused(str(tmp_path / "list.jsonl"), "list.jsonl, row 1, must be an object, not list")
    (tmp_path / "t.txt").write_text("prose")
    refused(str(tmp_path / "t.txt"), "t.txt is text without columns")
    refused(str(tmp_path / "nowhere.jsonl"), "nowhere.jsonl")
    tokenizer.chat_template = REWRITES
    refused(good, "row 1, does not fit the chat template: it rewrites", "{% generation %}")
    tokenizer.chat_template = STRICT
    refused([chat(*TURNS)], "row 1, does not fit the chat template: begin with")
    assert tokenise_chat(write(tmp_path / "m.jsonl", [chat(*TURNS), *good]), tokenizer, "all", tmp_path).starts[1] == 0
    tokenizer.chat_template = None
    refused(good, "chat template", "--chat-template")
