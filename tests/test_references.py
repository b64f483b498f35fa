"""Check that every way to name a model is understood, or refused with one line that says what to name."""

import pytest

from pilon_compress.errors import BadInput
from pilon_compress.models.references import resolve


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("https://huggingface.co/openai-community/gpt2", "openai-community/gpt2"),
        ("https://huggingface.co/openai-community/gpt2/", "openai-community/gpt2"),
        ("https://huggingface.co/gpt2", "gpt2"),
        ("http://hf.co/openai-community/gpt2/tree/main", "openai-community/gpt2"),
        ("https://huggingface.co/openai-community/gpt2/blob/main/config.json", "openai-community/gpt2"),
        ("https://www.huggingface.co/openai-community/gpt2?library=transformers#how", "openai-community/gpt2"),
    ],
)
def test_the_address_of_a_hub_page_is_its_model(page, name):
    assert resolve(page) == name


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("https://huggingface.co/datasets/Salesforce/wikitext", "datasets"),
        ("https://huggingface.co/spaces/some/demo", "spaces"),
        ("https://huggingface.co/", "names no model"),
        ("https://huggingface.co/openai-community/gpt2/tree/v2", "revision 'v2'"),
        ("https://example.org/openai-community/gpt2", "not on the hub"),
        ("no such model", "name a folder"),
        ("", "name a folder"),
        ("a" * 300 + "/" + "b" * 300, "cannot be a model"),
        ("bad\0name", "is not a model"),
        ("nowhere.gguf", "there is no file nowhere.gguf"),
        ("./nowhere.gguf", "there is no file"),
        ("package:no-such-package-here", "pip install no-such-package-here"),
        ("package:json", "neither config.json"),
    ],
)
def test_anything_else_is_refused_in_one_line(reference, reason):
    with pytest.raises(BadInput, match=reason) as refused:
        resolve(reference)
    assert "\n" not in str(refused.value)


def test_an_adapter_says_that_it_is_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match="LoRA"):
        resolve(str(tmp_path))


def test_a_folder_of_gguf_files_names_one(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="tiny.gguf"):
        resolve(str(tmp_path))


def test_a_gguf_of_a_hub_repository_needs_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("some/repo/model.gguf", "https://huggingface.co/some/repo/blob/main/model.gguf"):
        with pytest.raises(BadInput, match="out of reach"):
            resolve(name)
