"""Fixtures for every test: `tiny`, the module of tiny models (in importlib mode tests cannot import each other)."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests start subprocesses; forking would make it complain


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny.py: tiny_tokenizer(), tiny_model(family), save_tiny(family, folder)."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
