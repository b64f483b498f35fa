"""Every call has an example that runs and ends with printed output; the snippets of the page run, too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pilon_compress as pc

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "python-api.md").read_text("utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
CALLS = ["compress", "save", "load", "heal", "train", "evaluate", "compare", "export", "inspect", "benchmark"]
PROSE = "\n\n".join(
    f"Paragraph {chr(97 + i % 26)}{chr(97 + i // 26)} tells of {'many ' * (i % 5)}things and of nothing else "
    "but the very things it names, one after the other."
    for i in range(400)
)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with a dense model `dense`, its conversion `half` and a text."""
    folder = tmp_path_factory.mktemp("examples")
    tiny.save_tiny("llama", folder / "dense")
    (folder / "text.txt").write_text(PROSE)
    config = pc.ConvertConfig(effort="fast", calibration=pc.CalibrationConfig(samples=16, sequence_length=32))
    pc.convert_model(folder / "dense", folder / "half", config, str(folder / "text.txt"))
    return folder


def run(*words, cwd):
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "PILON_CACHE": str(cwd / "cache")}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, env=surroundings)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("name", "words", "printed"),
    [
        ("compress", ["dense"], "whitened loss, svd"),
        ("save_and_load", ["dense", "saved"], "LlamaForCausalLM with "),
        ("heal", ["half", "text.txt", "1024"], "before healing"),
        ("train", ["text.txt", "1024"], "validation perplexity"),
        ("evaluate_model", ["half", "dense", "text.txt"], "perplexity_ratio: "),
        ("compare", ["dense", "text.txt"], "svd: whitened loss"),
        ("export", ["half", "plain"], "plain loads with AutoModel"),
        ("inspect_model", ["half"], "LlamaForCausalLM, pilon"),
        ("benchmark", ["half", "1"], "pilon_fp32: "),
    ],
)
def test_examples_run_and_print(place, name, words, printed):
    assert printed in run(ROOT / "examples" / f"{name}.py", *words, cwd=place)


def test_every_call_has_an_example_and_a_snippet():
    examples = "".join(path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py"))
    for call in CALLS:
        assert f"pc.{call}(" in examples and any(f"pc.{call}(" in snippet for snippet in SNIPPETS), call


def test_the_snippets_of_the_page_run_one_after_the_other(place):
    code = "\n".join(SNIPPETS)
    assert "0.5" in run("-c", code + "\nprint(round(report.ffn.stored_ratio, 1))", cwd=place)
