"""Every call has an example that runs and ends with printed output; the snippets of the page run, too."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

import pilon_compress as pc
from pilon_compress.kernels import build

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
    (folder / "cache" / "kernels").mkdir(parents=True)
    with suppress(build.KernelUnavailable):  # it would be compiled again for a cache of one's own
        shutil.copy(build.library(), folder / "cache" / "kernels")
    pc.convert_model(folder / "dense", folder / "half", config, str(folder / "text.txt"))
    return folder


@pytest.fixture
def run(cli, place):
    """Runs a script there and returns what it prints."""
    return lambda text, *words: cli.python(text, *words, cwd=place, PILON_CACHE=str(place / "cache")).stdout


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
def test_examples_run_and_print(run, name, words, printed):
    assert printed in run((ROOT / "examples" / f"{name}.py").read_text("utf-8"), *words)


def test_every_call_has_an_example_and_a_snippet():
    examples = "".join(path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py"))
    for call in CALLS:
        assert f"pc.{call}(" in examples and any(f"pc.{call}(" in snippet for snippet in SNIPPETS), call


def test_the_snippets_of_the_page_run_one_after_the_other(run):
    code = "\n".join(SNIPPETS)
    assert "0.5" in run(code + "\nprint(round(report.ffn.stored_ratio, 1))")
