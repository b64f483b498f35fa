"""Write a tokenizer into a GGUF file: tokens, their kinds, merges, special tokens, and the chat template."""

import json
from pathlib import Path
from typing import Any

from pilon_compress.errors import BadInput

SPECIAL = ("bos", "eos", "unk", "pad")
WORD = "\u2581"  # before the first piece of a word
NORMAL, CONTROL, ADDED, UNUSED = 1, 3, 4, 5  # kinds of tokens, in gguf's numbers


def pre_tokenizer(core: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the rule by which a byte-level tokenizer.json splits text; None where it has none."""
    rule = core.get("pre_tokenizer") or {}
    parts = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    kinds = [part.get("type") for part in parts]
    if not parts or kinds[-1] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = str(parts[0].get("pattern", {}).get("Regex", ""))
        if "(?i:'s|'t|'re|'ve|'m|'ll|'d)" in pattern:
            return "llama-bpe" if r"\p{N}{1,3}" in pattern else "qwen2" if r"|\p{N}|" in pattern else None
    return None


def refuse(folder: Path, encoder: bool = False) -> str | None:
    """Say, as the end of a sentence, why the tokenizer of `folder` cannot be written; None if it can.

    encoder: the model is a BERT, whose vocabulary llama.cpp reads as WordPiece
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "has no tokenizer.json, from which a GGUF file takes its vocabulary"
    core = json.loads(path.read_text("utf-8"))
    if core["model"].get("type") == "WordPiece":
        folds = (core.get("normalizer") or {}).get("lowercase", False)
        return None if folds else "has a WordPiece tokenizer that keeps capitals, which llama.cpp lowers"
    if encoder:
        return "has a tokenizer other than WordPiece, which llama.cpp's bert does not read"
    if core["model"].get("type") != "BPE" or pre_tokenizer(core) is None:
        return "has a tokenizer that is neither WordPiece nor splits like gpt-2, smollm, qwen2 or llama-bpe"
    return None


def add_vocabulary(writer: Any, folder: Path, size: int) -> None:
    """Write the tokenizer of `folder` with `size` tokens, that of the embedding; those that it lacks are unused.

    Raises BadInput where it has more tokens than the embedding.
    """
    import gguf

    core = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = {index: word for word, index in core["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, NORMAL)
    for token in core.get("added_tokens", []):
        words[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else ADDED
    if words and max(words) >= size:
        raise BadInput(f"the tokenizer has token {max(words)}, and the model an embedding of {size} tokens")
    pieces = core["model"]["type"] == "WordPiece"
    writer.add_tokenizer_model("bert" if pieces else "gpt2")
    shown = {index: _piece(word) if pieces else word for index, word in words.items()}
    writer.add_token_list([shown.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([kinds.get(index, UNUSED) for index in range(size)])
    if pieces:
        _add_bert(writer, words)
        return
    writer.add_tokenizer_pre(pre_tokenizer(core))
    merges = [one if isinstance(one, str) else " ".join(one) for one in core["model"]["merges"]]
    writer.add_token_merges(merges or ["\u0100 \u0100"])  # llama.cpp wants one: two zero bytes, which no token is
    special = gguf.SpecialVocab(folder, special_token_types=SPECIAL, n_vocab=size)
    if "bos" not in special.add_special_token:
        special.add_special_token["bos"] = False
    special.add_to_gguf(writer, quiet=True)


def _piece(word: str) -> str:
    """Return a piece of WordPiece as llama.cpp writes it: what begins a word is marked, not what goes on."""
    if word.startswith("[") and word.endswith("]"):
        return word
    return word.removeprefix("##") if word.startswith("##") else WORD + word


def _add_bert(writer: Any, words: dict[int, str]) -> None:
    """Write the special tokens of a WordPiece vocabulary; [CLS] stands in the place of BOS."""
    ids = {word: index for index, word in words.items()}
    writer.add_token_type_count(2)
    writer.add_bos_token_id(ids["[CLS]"])
    writer.add_eos_token_id(ids["[SEP]"])
    writer.add_sep_token_id(ids["[SEP]"])
    writer.add_unk_token_id(ids["[UNK]"])
    writer.add_pad_token_id(ids["[PAD]"])
    if "[MASK]" in ids:
        writer.add_mask_token_id(ids["[MASK]"])
