"""Fine-tuning on chats: a model learns to answer and to stop, and may keep its banks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pilon_compress.config import training
from pilon_compress.config.conversion import build as conversion
from pilon_compress.convert.pipeline import convert
from pilon_compress.errors import BadInput
from pilon_compress.train.pipeline import train_model

TEMPLATE = (
    "{% for m in messages %}<cls>{{ m['role'] }}:{{ m['content'] }}<sep>{% endfor %}"
    "{% if add_generation_prompt %}<cls>assistant:{% endif %}"
)
ANSWERS = {"red": "rose", "blue": "sky", "green": "leaf"}


@pytest.fixture(scope="module")
def chats(tiny, tmp_path_factory):
    """A folder with a PILON model, a chat template and conversations that always go the same way."""
    folder = tmp_path_factory.mktemp("chats")
    tiny.save_tiny("llama", folder / "dense")
    budget = {"budget": {"ffn_ratio": 0.6, "bands": 1}, "calibration": {"data": "stdlib:topics", "samples": 8}}
    convert(conversion({"model": str(folder / "dense"), **budget, "evaluation": {"data": "none"}}), folder / "pilon")
    (folder / "template.jinja").write_text(TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": f"{c}{n}"}, {"role": "assistant", "content": answer}]}
        for n in range(30)
        for c, answer in ANSWERS.items()
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PILON_CACHE", str(folder / "tokens"))
        yield folder


def tune(folder, output, *overrides, start="pilon"):
    asked = {
        "task": "sft",
        "start": str(folder / start),
        "data": {
            "source": str(folder / "chats.jsonl"),
            "sequence_length": 128,
            "chat_template": str(folder / "template.jinja"),
        },
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"tokens": 128 * 8 * 60},
        "run": {"batch_size": 8},
    }
    return train_model(training.build(asked, overrides), folder / output, quiet=True).dump()


def test_it_learns_to_answer_and_generation_stops(chats):
    result = tune(chats, "tuned")
    assert result["val_perplexity"] < 1.2
    tokenizer = AutoTokenizer.from_pretrained(chats / "tuned")
    model = AutoModelForCausalLM.from_pretrained(chats / "tuned")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "blue77"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(out) == "sky<sep>"  # the end of the turn, and nothing behind it
    assert result["ffn"]["stored_ratio"] < 0.61


def test_compositions_alone_may_learn(chats):
    tune(chats, "light", "run.train=compositions", "schedule.tokens=16384")
    before, after = (load_file(chats / name / "model.safetensors") for name in ("pilon", "light"))
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert moved and all(name.endswith("_proj.weight") for name in moved)
    assert not any(".A" in name or ".B" in name for name in moved)


def test_a_tokenizer_without_template_is_refused_in_one_line(chats):
    with pytest.raises(BadInput, match="chat template"):
        tune(chats, "none", "data.chat_template=null")
    with pytest.raises(BadInput, match="name the conversations"):
        tune(chats, "none", "data.source=null")
