"""GGUF files that we write, as llama.cpp itself reads them."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pilon_compress.config.export import ExportOptions
from pilon_compress.errors import BadInput
from pilon_compress.export.llama_cpp import architectures, runtime, tensors, vocabulary
from pilon_compress.export.run import export, targets
from pilon_compress.export.verify import ExportFailed
from tests.test_stock_formats import make, uneven  # noqa: F401 - a fixture

needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp (xllamacpp) is not installed")


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_llama_cpp_computes_what_a_uniform_model_computes(tiny, tmp_path, family):
    folder = make(tmp_path, tiny, family, uniform_width=True)
    found = export(str(folder), tmp_path / "made", "gguf", ExportOptions(type="f32")).dump()
    assert found["architecture"] == family
    assert found["verified"] and found["max_logit_difference"] < 5e-3
    (file,) = (tmp_path / "made").glob("*.gguf")
    assert file.name == found["file"] and file.stat().st_size == found["bytes"]


@needs_llama_cpp
def test_layers_of_different_widths_are_exact_in_architecture_deci(uneven, tmp_path):  # noqa: F811
    found = export(str(uneven), tmp_path / "made", "gguf", ExportOptions(type="f32")).dump()
    assert found["architecture"] == "deci" and found["max_logit_difference"] < 5e-3
    running = runtime.Runtime(tmp_path / "made" / found["file"])
    ours, words = AutoModelForCausalLM.from_pretrained(uneven), AutoTokenizer.from_pretrained(uneven)
    ids = words("for x in range", return_tensors="pt")["input_ids"]
    expected = ours(ids).logits[0, -1].log_softmax(-1)
    told = running.likeliest(ids[0].tolist())
    assert max(told, key=told.get) == int(expected.argmax())


@needs_llama_cpp
def test_heads_in_another_order_are_seen(tiny, tmp_path, monkeypatch):
    folder = make(tmp_path, tiny, "llama", uniform_width=True)
    monkeypatch.setattr(architectures, "ROTATED", ())
    with pytest.raises(ExportFailed, match="computes something else .* nothing is written"):
        export(str(folder), tmp_path / "made", "gguf", ExportOptions(type="f32"))


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m"])
def test_a_file_that_computes_something_else_is_not_kept(tiny, tmp_path, monkeypatch, kind):
    folder = make(tmp_path, tiny, "llama", uniform_width=True, multiple_of=32)
    right = export(str(folder), tmp_path / "right", "gguf", ExportOptions(type=kind)).dump()
    assert right["verified"] and right["difference_as_written"] <= right["max_logit_difference"] + 1e-3
    right_order = tensors.turned

    def wrong_order(name, weight, *more):
        return right_order(name, weight.flip(0) if "_proj" in name else weight, *more)

    monkeypatch.setattr(tensors, "turned", wrong_order)
    with pytest.raises(ExportFailed, match="computes something else .* nothing is written"):
        export(str(folder), tmp_path / "made", "gguf", ExportOptions(type=kind))
    assert not (tmp_path / "made").exists()


def test_a_file_that_nothing_has_loaded_says_so(tiny, tmp_path, monkeypatch):
    folder = make(tmp_path, tiny, "llama", uniform_width=True)
    monkeypatch.setattr(runtime, "available", lambda: False)
    found = export(str(folder), tmp_path / "made", "gguf", ExportOptions(type="f32")).dump()
    assert found["verified"] is False and found.get("max_logit_difference") is None
    assert any(one.startswith("NOT VERIFIED: llama.cpp is not installed") for one in found["remarks"])


def test_rows_that_fill_no_block_get_the_next_type():
    kinds = {
        ("blk.0.ffn_up.weight", (64, 96), "q8_0"): "Q8_0",
        ("blk.0.ffn_down.weight", (64, 90), "q8_0"): "F16",
        ("blk.0.attn_norm.weight", (64,), "q8_0"): "F32",
        ("token_embd.weight", (300, 64), "q4_0"): "Q8_0",
        ("blk.0.ffn_down.weight", (64, 512), "q4_k_m"): "Q4_K",
        ("blk.2.ffn_down.weight", (64, 512), "q4_k_m"): "Q6_K",
        ("blk.2.ffn_down.weight", (64, 576), "q4_k_m"): "Q8_0",
        ("blk.0.ffn_up.weight", (64, 576), "q4_k_m"): "Q5_0",
    }
    assert {asked: tensors.kind_of(asked[0], asked[1], asked[2], 3) for asked in kinds} == kinds


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m"])
def test_the_command_line_writes_one_smaller_file(tiny, tmp_path, kind):
    folder = make(tmp_path, tiny, "llama", uniform_width=True, multiple_of=32)
    words = ["export", str(folder), "--to", "gguf", "--type", kind, "-o", str(tmp_path / "made"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pilon_compress.cli", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    full = export(str(folder), tmp_path / "full", "gguf", ExportOptions(type="f32")).dump()
    assert told["bytes"] < full["bytes"] and told["types"].keys() <= {"F32", "Q8_0", "Q4_0", "Q5_0"}
    assert [path.suffix for path in (tmp_path / "made").iterdir()].count(".gguf") == 1


@needs_llama_cpp
def test_a_bos_that_the_tokenizer_adds_is_added_by_llama_cpp_too(tiny, tmp_path, monkeypatch):
    words = tiny.tiny_tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    monkeypatch.setattr(tiny, "tiny_tokenizer", lambda **_: words)
    folder = make(tmp_path, tiny, "llama", uniform_width=True)
    found = export(str(folder), tmp_path / "made", "gguf").dump()
    running = runtime.Runtime(tmp_path / "made" / found["file"])
    plain = running.tokenize("a river")
    assert running.tokenize("a river", special=True) == [1, *plain] == words("a river")["input_ids"]
    monkeypatch.setattr(vocabulary, "SPECIAL", ())  # a file without its BOS
    with pytest.raises(ExportFailed, match="begins text otherwise"):
        export(str(folder), tmp_path / "other", "gguf")


def word_pieces():
    """A lower-casing WordPiece tokenizer of letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{one}" for one in letters),
        *"0123456789.,:;'-?\"",
    ]
    core = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@needs_llama_cpp
def test_llama_cpp_embeds_as_a_converted_encoder_does(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "tiny_tokenizer", lambda **_: word_pieces())
    folder = make(tmp_path, tiny, "bert", uniform_width=True)
    found = export(str(folder), tmp_path / "made", "gguf", ExportOptions(type="f32")).dump()
    assert found["architecture"] == "bert" and found["max_logit_difference"] < 1e-4
    running = runtime.Runtime(tmp_path / "made" / found["file"], embeds=True)
    first, other = running.embedding("a river"), running.embedding("the price of bread")
    assert len(first) == 32 and first != other


def test_what_cannot_become_a_file_is_said_before_anything_is_written(tiny, tmp_path):
    bert = make(tmp_path, tiny, "bert", uniform_width=True)
    with pytest.raises(BadInput, match="other than WordPiece"):
        export(str(bert), tmp_path / "made", "gguf")
    (tmp_path / "b").mkdir()
    opt = make(tmp_path / "b", tiny, "opt", uniform_width=True)
    reasons = {one.target: one.reason for one in targets(str(opt))}
    assert reasons["gguf"].startswith("is of the type opt") and reasons["native"] == ""
    assert "other than WordPiece" in {one.target: one.reason for one in targets(str(bert))}["gguf"]
    with pytest.raises(BadInput, match="--type does not apply to an export to native"):
        export(str(bert), tmp_path / "made", "native", ExportOptions(type="f16"))
    assert not (tmp_path / "made").exists()


def test_splitting_rules_are_known_by_their_tokenizer_json():
    split = {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{N}{1,3}|..."}}
    plain, digits = {"type": "ByteLevel"}, {"type": "Digits", "individual_digits": True}
    assert vocabulary.pre_tokenizer({"pre_tokenizer": plain}) == "gpt-2"
    both = {"type": "Sequence", "pretokenizers": [digits, plain]}
    assert vocabulary.pre_tokenizer({"pre_tokenizer": both}) == "smollm"
    llama = {"type": "Sequence", "pretokenizers": [split, plain]}
    assert vocabulary.pre_tokenizer({"pre_tokenizer": llama}) == "llama-bpe"
    assert vocabulary.pre_tokenizer({"pre_tokenizer": {"type": "Metaspace"}}) is None
