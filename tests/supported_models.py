"""Writes docs/supported-models.md from the models of tests/tiny.py: each is walked block by block, as conversion does.

python tests/supported_models.py > docs/supported-models.md
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from transformers import PreTrainedModel

from pilon_compress.data.batch import Batch
from pilon_compress.errors import BadInput
from pilon_compress.models.architectures.registry import ARCHITECTURES
from pilon_compress.models.families import find_sites
from pilon_compress.models.source import Source
from pilon_compress.models.stream_check import check_stream
from pilon_compress.models.task import is_causal

OWN = ("arcee", "llama")  # architectures of the package, whatever plug-ins a process has imported
HEAD = """# Supported models

Made by `python tests/supported_models.py` from the tests' own models, a random one of each architecture: each is walked
block by block and compared with its own forward pass, as every conversion does before it starts. `make fix` writes this
page anew, and a test keeps it in step. Real models with their figures:
[results/real-models.md](results/real-models.md).

Architectures that are not listed are tried in the same way; their feed-forward projections are found by their shapes.

| model type | class | converts | feed-forward projections | whole neurons can be dropped |
|---|---|---|---|---|
"""
TAIL = """
Trained from scratch (`host.family` of a recipe):

| name | what it is |
|---|---|
"""


def page(tiny: ModuleType) -> str:
    """Return the page: known families first, then the other architectures of the tests, each by name."""
    models = [(name, tiny.tiny_model(name)) for name in sorted(tiny.SHAPES)]
    models += [(name, tiny.other_model(name)) for name in sorted(tiny.OTHERS) if name not in tiny.SHAPES]
    rows = [_row([f"`{name}`", type(model).__name__, *_found(model)]) for name, model in models]
    own = [_row([f"`{name}`", ARCHITECTURES[name].about]) for name in OWN]
    return HEAD + "\n".join(rows) + "\n" + TAIL + "\n".join(own) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _found(model: PreTrainedModel) -> list[str]:
    """Return whether the model converts (or why not), its projections, and whether its neurons are independent."""
    ids = torch.arange(5, 33).reshape(2, 14)
    try:
        sites = find_sites(model)
        check_stream(Source(model), Batch(ids, torch.ones_like(ids)), head=is_causal(model.config))
    except BadInput as refusal:
        return [f"no: {str(refusal).partition(' (')[0].partition(';')[0]}", "–", "–"]
    roles = ", ".join(dict.fromkeys(site.role for site in sites))
    return ["yes", roles, "yes" if all(site.block for site in sites) else "no"]


def main() -> None:
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    sys.stdout.write(page(tiny))


if __name__ == "__main__":
    main()
