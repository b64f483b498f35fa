"""The calls for Python programs: on objects and references alike; what is handed over never changes."""

import copy
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import pilon_compress as pc
from pilon_compress.nn.installed import layout_of

IDS = torch.arange(5, 45).reshape(2, 20)
TEXTS = [
    f"Paragraph {chr(97 + i % 26)}{chr(97 + i // 26)} tells of {'many ' * (i % 5)}things and of nothing else "
    "but the very things it names."
    for i in range(120)
]
SMALL = pc.CalibrationConfig(samples=8, sequence_length=32, batch_size=4)
FAST = pc.ConvertConfig(ffn_ratio=0.5, effort="fast", calibration=SMALL)


@pytest.fixture(scope="module")
def dense(tiny):
    return tiny.tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="module")
def compressed(dense, tokenizer):
    return pc.compress(dense, tokenizer, FAST, calibration=TEXTS)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model):
    """Everything of a model that a call might change, its tensors by value."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad, p.dtype, str(p.device)) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return tensors, flags, hooks, [m.training for m in model.modules()], model.config.to_dict()


def assert_unchanged(before, model):
    after = state(model)
    assert before[1:] == after[1:]
    assert all(torch.equal(before[0][name], tensor) for name, tensor in after[0].items())


def test_an_object_is_compressed_and_stays_as_it_was(tiny, tokenizer):
    dense = tiny.tiny_model("llama").train()
    before, words = state(dense), copy.deepcopy(tokenizer.init_kwargs)
    model, report = pc.compress(dense, tokenizer, FAST, calibration=TEXTS)
    assert_unchanged(before, dense)
    assert tokenizer.init_kwargs == words
    assert 0.3 < report.ffn.stored_ratio <= 0.5 and report.model.stored_ratio < 1
    assert report.whitened_loss["pilon"] < report.whitened_loss["svd"]
    assert report.calibration.texts == 8 and report.evaluation.perplexity_ratio > 0
    assert report.evaluation.data == f"{report.calibration.data} (held-out part)"
    own = {tensor.data_ptr() for tensor in dense.state_dict().values()}
    assert not any(tensor.data_ptr() in own for tensor in model.state_dict().values()), "no tensor is shared"
    layout = layout_of(model)
    assert type(model) is type(dense) and not model.training
    assert layout.projections.keys() | layout.matrices.keys() == {
        name for name, _ in dense.model.named_modules() if "_proj" in name and "mlp" in name
    }, "every projection has factors or fewer neurons"


def test_an_object_without_its_head_is_an_encoder(tiny, tokenizer, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    bare = AutoModel.from_pretrained(tmp_path / "dense")
    assert bare.config.architectures == ["LlamaForCausalLM"], "transformers keeps the name of the head"
    model, report = pc.compress(bare, tokenizer, FAST, calibration=TEXTS)
    assert type(model) is type(bare) and report.evaluation.kind == "encoder"
    assert model.config.architectures == ["LlamaModel"] and bare.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_other_families_and_integers_and_half_precision(tiny, tmp_path, family):
    dense, ends = tiny.tiny_model(family).bfloat16(), family == "bert"
    config = pc.ConvertConfig(bank_dtype="int4", effort="fast", calibration=SMALL)
    model, report = pc.compress(dense, tiny.tiny_tokenizer(ends=ends), config, TEXTS, evaluation="none")
    assert report.evaluation is None and report.evaluation_skipped == "not asked for"
    assert model.dtype == torch.bfloat16 and report.dtype == "bfloat16" and report.ffn.bytes_ratio < 0.3
    pc.save(model, tmp_path / "out")
    assert torch.equal(logits(pc.load(tmp_path / "out")), logits(model))


def test_what_is_saved_is_what_the_command_line_writes(tiny, tokenizer, compressed, tmp_path):
    model, report = compressed
    assert pc.save(model, tmp_path / "ours") == tmp_path / "ours"
    dense = tiny.save_tiny("llama", tmp_path / "dense")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    theirs = pc.convert_model(tmp_path / "dense", tmp_path / "theirs", FAST, str(tmp_path / "texts.jsonl"))
    assert torch.equal(logits(model), logits(pc.load(tmp_path / "theirs"))), "the road through a folder is the same"
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("ours", "theirs")]
    assert files[0] == files[1] and {"recipe.yaml", "README.md", "report.html", "report.json"} < set(files[0])
    told = {"source", "command", "output", "recipe", "calibration", "evaluation", "seconds", "peak_rss_gib", "estimate"}
    written = json.loads((tmp_path / "ours" / "report.json").read_text())
    assert written["output"] == str(tmp_path / "ours")
    assert written | {"output": ""} == json.loads(json.dumps(report.dump()))
    assert written.keys() == theirs.dump().keys()
    assert {k: v for k, v in written.items() if k not in told} == {
        k: v for k, v in json.loads(json.dumps(theirs.dump())).items() if k not in told
    }
    assert isinstance(dense, type(model))


def test_a_saved_model_is_the_same_when_it_is_loaded_and_saved_again(compressed, tmp_path):
    model, _ = compressed
    pc.save(model, tmp_path / "one")
    loaded = pc.load(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(model))
    pc.save(loaded, tmp_path / "two")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "two")), logits(model))
    for name in ("recipe.yaml", "README.md", "report.json", "report.html", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    with pytest.raises(pc.BadInput, match="not empty"):
        pc.save(model, tmp_path / "two")
    pc.save(model, tmp_path / "two", overwrite=True)


def test_the_result_is_a_model_of_transformers(compressed, tokenizer, tmp_path):
    model, _ = compressed
    out = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 24
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model)) and layout_of(again) == layout_of(model)
    trained = copy.deepcopy(model).train()
    trained(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad and p.numel() > 1)


def test_flat_fields_reach_their_sections(dense, tokenizer):
    config = pc.ConvertConfig(ffn_ratio=0.4, ignore=[r"re:.*\.0\..*"], seed=3, effort="fast", calibration=SMALL)
    _, report = pc.compress(dense, tokenizer, config, TEXTS, evaluation="none")
    assert sorted({layer for bank in report.plan.banks for layer in bank.layers}) == [1, 2]
    assert "seed: 3" in report.recipe and "ffn_ratio: 0.4" in report.recipe and "effort: fast" in report.recipe


def test_by_reference(tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    model, report = pc.compress(str(tmp_path / "dense"), config=FAST, calibration=TEXTS, evaluation=TEXTS[:30])
    assert report.source == str(tmp_path / "dense") and report.evaluation.data.startswith("memory:30-texts-")
    pc.save(model, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == tiny.tiny_tokenizer().vocab_size
    found = pc.evaluate(tmp_path / "out", data=TEXTS[:30])
    assert found.against == str(tmp_path / "dense"), "as its recipe says"
    assert found.perplexity == pytest.approx(report.evaluation.perplexity, rel=1e-4)


def test_an_object_that_was_loaded_keeps_its_name_and_its_companions(tiny, tmp_path):
    tiny.save_tiny("bert", tmp_path / "dense")
    (tmp_path / "dense" / "LICENSE").write_text("free")
    model, report = pc.compress(pc.load(tmp_path / "dense"), None, FAST, TEXTS)
    assert report.source == str(tmp_path / "dense")
    pc.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert f"model: {tmp_path / 'dense'}" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert pc.evaluate(tmp_path / "out", data=TEXTS).against == str(tmp_path / "dense")


def test_evaluation_of_objects(dense, tokenizer, compressed):
    model, report = compressed
    before = state(dense), state(model)
    found = pc.evaluate(model, against=dense, data=TEXTS, config=pc.EvaluateConfig(window=64))
    assert found.kind == "causal" and found.perplexity_ratio > 0.5 and 0 <= found.top1_agreement <= 1
    assert "(held-out part)" in found.data, "it was calibrated on these texts"
    assert_unchanged(before[0], dense)
    assert_unchanged(before[1], model)
    same = pc.evaluate(dense, tokenizer, against=dense, data=TEXTS)
    assert (same.perplexity_ratio, same.kl, same.top1_agreement) == (1.0, 0.0, 1.0)
    assert pc.evaluate(dense, tokenizer, data=TEXTS).kl is None
    with pytest.raises(pc.BadInput, match="no tokenizer"):
        pc.evaluate(dense, data=TEXTS)


def test_inspection(dense, compressed, tmp_path):
    model, report = compressed
    plain, ours = pc.inspect(dense), pc.inspect(model)
    assert (plain.form, ours.form) == ("dense", "pilon") and len(plain.projections) == 9
    assert ours.ffn == report.ffn and ours.evaluation == report.evaluation
    assert pc.inspect(dense, ignore=["re:.*down_proj"]).replaced < plain.replaced
    pc.save(model, tmp_path / "out")
    named = pc.inspect(tmp_path / "out")
    assert named.model == str(tmp_path / "out")
    assert named.model_copy(update={"model": ""}) == ours.model_copy(update={"model": ""})


def test_export(compressed, tmp_path):
    model, _ = compressed
    before = state(model)
    result = pc.export(model, tmp_path / "dense", to="dense")
    assert_unchanged(before, model)
    assert (result.to, result.output) == ("dense", str(tmp_path / "dense")) and result.figures.ffn is None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.allclose(logits(plain), logits(model), atol=1e-4) and not layout_of(plain).projections
    with pytest.raises(pc.BadInput, match="not ternary"):
        pc.export(model, tmp_path / "packed", to="packed")


def test_benchmark(compressed):
    config = pc.BenchConfig(rounds=1, context=8, variants=["pilon_loaded"], threads=1)
    threads = torch.get_num_threads()
    found = pc.benchmark(compressed[0], config)
    assert set(found.prefill) == set(found.decode) == {"dense_fp32", "pilon_loaded"}
    assert found.prefill["pilon_loaded"].seconds > 0 and found.rounds == 1
    block = pc.benchmark(config=pc.BenchConfig(ffn="32x64", rank=4, rounds=1, variants=["pilon_fp32"]))
    assert block.ffn.hidden == 64 and block.variants["pilon_fp32"].bandwidth_share > 0
    assert torch.get_num_threads() == threads
    with pytest.raises(pc.BadInput, match="name either"):
        pc.benchmark()


def test_comparison(dense, tokenizer, tmp_path):
    config = pc.CompareConfig(ffn_ratio=[0.6], methods=["pilon", "svd"], seeds=1, calibration=SMALL)
    found = pc.compare(dense, tokenizer, config, TEXTS)
    assert sorted(row.method for row in found.rows) == ["pilon", "svd"] and found.output == ""
    losses = {row.method: row.whitened_loss.mean for row in found.rows}
    assert losses["pilon"] < losses["svd"]
    assert found.dense.quality.perplexity_ratio == 1
    kept = pc.compare(dense, tokenizer, config, TEXTS, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == json.loads(json.dumps(kept.dump()))
    assert [cell.quality for cell in kept.cells] == [cell.quality for cell in found.cells]


def test_healing(dense, tokenizer, compressed, tmp_path):
    model, report = compressed
    before = state(dense), state(model)
    config = pc.HealConfig(tokens=256, sequence_length=32, batch_size=2, validation_sequences=4)
    healed, result = pc.heal(model, config=config, data=TEXTS, teacher=dense)
    assert_unchanged(before[0], dense)
    assert_unchanged(before[1], model)
    assert result.task == "heal" and result.val_perplexity <= result.before and result.output == ""
    assert result.ffn.stored_ratio == report.ffn.stored_ratio
    pc.save(healed, tmp_path / "out")
    assert {"train.json", "recipe.yaml", "README.md", "train.html"} < {p.name for p in (tmp_path / "out").iterdir()}
    assert torch.equal(logits(pc.load(tmp_path / "out")), logits(healed))
    kept, again = pc.heal(model, config=config, data=TEXTS, teacher=dense, output=tmp_path / "kept")
    assert again.output == str(tmp_path / "kept") and torch.equal(logits(kept), logits(healed))
    with pytest.raises(pc.BadInput, match="does not tell|--teacher"):
        pc.heal(model, config=config, data=TEXTS)


def test_training_from_scratch_and_on_chats(tiny, tokenizer, tmp_path):
    host = pc.HostConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=tiny.VOCAB
    )
    config = pc.TrainConfig(host=host, tokens=256, sequence_length=32, batch_size=2, validation_sequences=4)
    model, result = pc.train(tokenizer=tokenizer, config=config, data=TEXTS)
    assert result.task == "pretrain" and result.tokens >= 256 and layout_of(model).projections
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}")
    chats = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"It is {i}."}]}
             for i in range(60)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    config = pc.TrainConfig(
        tokens=128, sequence_length=32, batch_size=2, validation_sequences=2, chat_template=str(template)
    )
    taught, result = pc.train(model, config=config, data=str(tmp_path / "chats.jsonl"))
    assert result.task == "sft" and not torch.equal(logits(taught), logits(model))


def test_mistakes_are_one_line_and_value_errors(dense, tokenizer, tmp_path):
    for call in (
        lambda: pc.compress(1, tokenizer),
        lambda: pc.compress(dense, tokenizer, FAST, calibration=[]),
        lambda: pc.compress(dense, tokenizer, FAST, calibration=["too short"]),
        lambda: pc.compress(dense, tokenizer, FAST, calibration=[1, 2]),
        lambda: pc.compress(dense, None, FAST, TEXTS),
        lambda: pc.compress(copy.deepcopy(dense).to("meta"), tokenizer, FAST, TEXTS),
        lambda: pc.compress(str(tmp_path / "nowhere"), config=FAST),
        lambda: pc.ConvertConfig(ffn_ratio=7),
        lambda: pc.ConvertConfig(nonsense=True),
        lambda: pc.HealConfig(tokens=-1),
        lambda: pc.save(copy.deepcopy(dense), tmp_path / "out"),
        lambda: pc.train(config=pc.TrainConfig(), data=TEXTS, resume=True),
    ):
        with pytest.raises(pc.BadInput) as refused:
            call()
        assert isinstance(refused.value, ValueError) and "\n" not in str(refused.value)


def test_a_model_that_was_in_memory_cannot_be_named_later(compressed, tmp_path):
    model, report = compressed
    pc.save(model, tmp_path / "out")
    assert report.source == "memory:LlamaForCausalLM" and report.calibration.data.startswith("memory:120-texts-")
    assert pc.evaluate(tmp_path / "out", data=TEXTS).against is None, "its dense model is known to nobody"
    for refused in (report.source, report.calibration.data):
        with pytest.raises(pc.BadInput, match="Python program"):
            pc.compress(report.source) if refused == report.source else pc.evaluate(tmp_path / "out", data=refused)


def test_a_call_leaves_random_numbers_and_threads_alone(dense, tokenizer, capfd):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    pc.compress(dense, tokenizer, FAST, TEXTS, evaluation="none")
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert capfd.readouterr() == ("", "")
