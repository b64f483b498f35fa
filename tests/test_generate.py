"""Generation: prompts begun as the tokenizer begins sequences, every EOS, options that are not ignored."""

import json

import pytest
import torch
from transformers import GenerationConfig
from typer.testing import CliRunner

from pilon_compress.config.generation import GenerateConfig
from pilon_compress.errors import BadInput
from pilon_compress.evaluate import generate as generating
from pilon_compress.models.checkpoint import load_model, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' and 'no' in m['content'] %}{{ raise_exception('no such system message') }}{% endif %}"
    "<sep>{{ m['role'] }}: {{ m['content'] }}<mask>{% endfor %}"
    "{% if add_generation_prompt %}<sep>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """`plain`: no chat template; `chat`: the template above, whose turns end in <mask>; `bert`: an encoder."""
    place = tmp_path_factory.mktemp("generate")
    for name, family in (("plain", "llama"), ("chat", "llama"), ("gpt2", "gpt2"), ("bert", "bert")):
        tiny.save_tiny(family, place / name, **({"n_positions": 48} if family == "gpt2" else {}))
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "chat")
    return place


def generate(cli, models, model, *words, **options):
    return json.loads(cli("generate", model, *words, "--json", cwd=models, **options).stdout)


def greedy(folder, ids, count):
    """Return the greedy continuation of `ids`, computed without a cache."""
    model, ids = load_model(str(folder), dtype="float32"), list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_a_prompt_is_continued_greedily_whatever_the_generation_config_samples(cli, models):
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=3, repetition_penalty=1.9, num_beams=2)
    config.save_pretrained(models / "plain")
    ids = greedy(models / "plain", load_tokenizer(str(models / "plain"))("A prompt")["input_ids"], 6)
    expected = load_tokenizer(str(models / "plain")).decode(ids, skip_special_tokens=True)
    found = generate(cli, models, "plain", "-p", "A prompt", "--max-new-tokens", 6)
    assert found["completion"] == expected and found["tokens"] == 6 and found["stop"] == "length"
    shown = cli("generate", "plain", "-p", "A prompt", "--max-new-tokens", 6, cwd=models)
    assert shown.stdout == f"A prompt{expected}\n" and shown.stderr == ""
    assert (
        cli("generate", "plain", "-p", "-", "--max-new-tokens", 6, cwd=models, stdin="A prompt").stdout == shown.stdout
    )


def test_sampling_options_do_what_they_say(cli, models):
    few = ("-p", "A prompt", "--max-new-tokens", 8)
    plain = generate(cli, models, "plain", *few)["completion"]
    assert generate(cli, models, "plain", *few, "--top-k", 1)["completion"] == plain
    assert generate(cli, models, "plain", *few, "--top-p", 1e-6)["completion"] == plain
    by_seed = {seed: generate(cli, models, "plain", *few, "--top-p", 0.9, "--seed", seed) for seed in (0, 1)}
    assert len({plain, *(found["completion"] for found in by_seed.values())}) == 3, "temperature 1 is implied"
    assert by_seed[1] == generate(cli, models, "plain", *few, "--top-p", 0.9, "--temperature", 1, "--seed", 1)
    tokenizer, model = load_tokenizer(str(models / "plain")), load_model(str(models / "plain"), dtype="float32")
    ids = generating.prompt_ids(tokenizer, "A prompt")
    writer = generating.Writer(tokenizer, set(), lambda piece: None)
    penalised = generating.sampling(GenerateConfig(model="plain", repetition_penalty=1e6))
    added = generating._generate(model, tokenizer, ids, 40, set(), writer, penalised)
    assert len({*ids, *added}) == len({*ids}) + 40, "what was there already does not come again"


def test_a_chat_model_answers_unless_raw(cli, models):
    tokenizer = load_tokenizer(str(models / "chat"))
    few = ("--max-new-tokens", 6)
    for words, rendered in (
        (("-p", "Hi"), "<bos><sep>user: Hi<mask><sep>assistant: "),
        (("-p", "Hi", "--system", "Be brief"), "<bos><sep>system: Be brief<mask><sep>user: Hi<mask><sep>assistant: "),
        (("-p", "Hi", "--raw"), "Hi"),
    ):
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == rendered.count("<bos>")
        expected = tokenizer.decode(greedy(models / "chat", ids, 6), skip_special_tokens=True)
        found = generate(cli, models, "chat", *words, *few)
        assert found["completion"] == expected and found["prompt"] == "Hi" and found["chat"] == ("--raw" not in words)
    assert cli("generate", "chat", "-p", "Hi", *few, cwd=models).stdout.startswith("Hi") is False


def begun(tokenizer, **template):
    """The tokenizer, which puts <bos> before a text and, if `ends`, <eos> behind it."""
    from tokenizers import processors

    single = "<bos> $A <eos>" if template.get("ends") else "<bos> $A"
    core = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer.backend_tokenizer.post_processor = core
    return tokenizer


def test_a_prompt_begins_as_the_tokenizer_begins_sequences_and_does_not_end(tiny):
    plain = tiny.tiny_tokenizer()("ab", add_special_tokens=False)["input_ids"]
    assert generating.prompt_ids(tiny.tiny_tokenizer(), "ab") == plain
    assert generating.prompt_ids(begun(tiny.tiny_tokenizer()), "ab") == [1, *plain]
    assert generating.prompt_ids(begun(tiny.tiny_tokenizer(), ends=True), "ab") == [1, *plain]
    assert generating.prompt_ids(begun(tiny.tiny_tokenizer()), "<bos>ab") == [1, *plain], "BOS stands there already"
    chat = begun(tiny.tiny_tokenizer())
    chat.chat_template = TEMPLATE
    assert generating.chat_ids(chat, "ab").count(1) == 1


@pytest.mark.parametrize("where", ["generation_config", "config", "tokenizer", "turn"])
def test_generation_stops_at_every_eos(tiny, where):
    """Each token that ends a text is made the only one that the model can say."""
    tokenizer, model = tiny.tiny_tokenizer(), tiny.tiny_model("llama", eos_token_id=[9, 10])
    tokenizer.chat_template = TEMPLATE
    model.generation_config.eos_token_id = [7, 8]
    ends = {"generation_config": 8, "config": 10, "tokenizer": 2, "turn": 261}
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[ends[where]] = 1e3
        model.model.norm.weight.zero_().add_(1)
    direction = model.model(torch.tensor([[50]])).last_hidden_state.sum()
    if direction < 0:
        model.lm_head.weight.data.neg_()
    assert generating.stop_tokens(model, tokenizer) == {7, 8, 9, 10, 2, 261}
    stops, writer = generating.stop_tokens(model, tokenizer), generating.Writer(tokenizer, set(), lambda piece: None)
    added = generating._generate(model, tokenizer, [50], 5, stops, writer, generating.GREEDY)
    assert added == [ends[where]]


def test_text_is_written_as_it_comes_but_no_half_character(tiny):
    tokenizer, pieces = tiny.tiny_tokenizer(), []
    writer = generating.Writer(tokenizer, {2}, pieces.append)
    writer.put(torch.tensor([[5, 6]]))
    for token in tokenizer("a é\n\n  b")["input_ids"]:
        writer.put(torch.tensor([token]))
    assert pieces == ["a", " ", "é", "\n", "\n", " ", " ", "b"]
    writer.put(torch.tensor([2]))
    writer.end()
    assert "".join(pieces) == writer.text == "a é\n\n  b"


def test_generation_ends_where_positions_end(cli, models):
    found = generate(cli, models, "gpt2", "-p", "x" * 40, "--max-new-tokens", 20)
    assert (found["tokens"], found["stop"]) in [(8, "context")] or found["stop"] == "eos"
    refused = cli("generate", "gpt2", "-p", "x" * 48, cwd=models, code=2)
    assert "48 tokens" in refused.stderr and refused.stderr.count("\n") == 1 and refused.stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("plain --temperature 0 --top-k 5", "--temperature: 0 does not sample, --top-k and --top-p do"),
        ("plain --temperature 0 --top-p 0.5", "--temperature: 0 does not sample"),
        ("plain --top-p 1.5", "--top-p: must be at most 1 (got 1.5)"),
        ("plain --top-p 0", "--top-p: must be above 0 (got 0)"),
        ("plain --top-k 0", "--top-k: must be at least 1 (got 0)"),
        ("plain --temperature nan", "--temperature: must be 0 (greedy)"),
        ("plain --temperature 1e-30", "--temperature: must be 0 (greedy)"),
        ("plain --repetition-penalty 0", "--repetition-penalty: must be above 0"),
        ("plain --system x", "plain has none"),
        ("chat --raw --system x", "--raw"),
        ("chat --system no", "no such system message"),
        ("plain --seed 99999999999999999999", "--seed: must be below"),
        ("bert", "encoder"),
    ],
)
def test_options_that_cannot_be_are_refused(models, monkeypatch, words, said):
    from pilon_compress.cli.main import app

    monkeypatch.chdir(models)
    refused = CliRunner().invoke(app, ["generate", *words.split(), "-p", "Hi"])
    assert isinstance(refused.exception, BadInput) and refused.stdout == ""
    assert said in str(refused.exception) and "\n" not in str(refused.exception)


def test_weights_that_are_not_numbers_are_refused(tiny, tmp_path):
    def damage(tensors, config):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    tiny.save_tiny("llama", tmp_path / "dense")
    tiny.damaged(tmp_path / "dense", tmp_path / "nan", damage)
    with pytest.raises(BadInput, match="NaN"):
        generating.complete(GenerateConfig(model=str(tmp_path / "nan")), "Hi")
