"""`pilon-compress compare` from end to end, on a tiny encoder and a tiny causal LM."""

import json
import signal
from pathlib import Path

import pytest

from pilon_compress.compare import run as comparing
from pilon_compress.config import conversion
from pilon_compress.convert import pipeline
from pilon_compress.errors import BadInput
from pilon_compress.io.output_paths import check_output
from pilon_compress.report import comparison_page

WORDS = ("the", "model", "layer", "weight", "bank", "primitive", "rank", "token", "memory", "reader", "engine")
PROSE = "\n\n".join(
    f"Paragraph {chr(97 + i % 26)} says that {' '.join(WORDS[(i * 7 + j * j) % 11] for j in range(16))} and no more."
    for i in range(120)
)
ENCODER = "compare dense --calibration text.txt --samples 32 --ffn-ratio 0.6 --seeds 2 --methods pilon,nystrom,svd"
CAUSAL = "compare causal --calibration text.txt --samples 4 --sequence-length 64 --eval-samples 2 --ffn-ratio 0.5"
CAUSAL += " --seeds 2 --methods svd,asvd"
REFUSED = {
    "compare dense -o new --methods pilon,magic": ["magic", "whitened-svd", "nystrom", "pilon-low-rank"],
    "compare dense -o new --methods svd --ffn-ratio 0.6 --ffn-ratio 0.01": ["0.01", "too small for svd"],
    "compare dense -o full --methods svd": ["full is not empty"],
}
# Ends itself like a power cut once CELLS cells are finished.
KILLED = """
import os, signal
from pilon_compress.io.result_log import ResultLog
keep = ResultLog.keep
def keep_and_die(self, key, cell):
    keep(self, key, cell)
    if len(self.found) == CELLS:
        os.kill(os.getpid(), signal.SIGKILL)
ResultLog.keep = keep_and_die
from pilon_compress.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with tiny models `dense` (BERT) and `causal` (GPT-2), `text.txt`, and `full`, which is not empty."""
    folder = tmp_path_factory.mktemp("compare")
    tiny.save_tiny("bert", folder / "dense")
    tiny.save_tiny("gpt2", folder / "causal")
    (folder / "text.txt").write_text(PROSE)
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("years of work")
    return folder


@pytest.fixture(scope="module")
def harmless(cli, place):
    """Return the answers of commands that must not write, and the files before and after."""

    def files():
        return {str(p): p.stat().st_mtime_ns for p in place.rglob("*")}

    before = files()
    asked = (*REFUSED, f"{ENCODER} --dry-run --json")
    answers = {words: cli(*words.split(), cwd=place, code=None) for words in asked}
    return answers, before, files()


@pytest.fixture(scope="module")
def compared(cli, place, harmless):
    """Return the output of `compare -o out --json`."""
    done = cli(*f"{ENCODER} -o out --json".split(), cwd=place)
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def figures(quality):
    return {key: value for key, value in quality.items() if isinstance(value, float)}


def settings(model="causal", **calibration):
    asked = {"data": "text.txt", "samples": 4, "sequence_length": 64, **calibration}
    return conversion.build({"model": model, "calibration": asked, "evaluation": {"samples": 2}})


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_one_line_and_leaves_nothing(harmless, words):
    answers, before, after = harmless
    answer = answers[words]
    lines = answer.stderr.splitlines()
    assert answer.returncode == 2 and answer.stdout == "", answer.stdout
    assert len(lines) == 1 and lines[0].startswith("error: "), answer.stderr
    assert all(word in lines[0] for word in REFUSED[words]), answer.stderr
    assert before == after


def test_dry_run_writes_nothing_and_promises_what_comes(harmless, compared):
    answers, before, after = harmless
    answer = answers[f"{ENCODER} --dry-run --json"]
    assert answer.returncode == 0 and answer.stderr == "" and before == after
    planned = json.loads(answer.stdout)
    assert planned["dry_run"] is True and planned["seeds"] == [0, 1] and planned["cells"] == 6
    assert planned["calibration"] == {"data": "text.txt", "samples": 32, "sequence_length": 128, "batch_size": 16}
    stored = {entry["method"]: entry["stored"] for entry in planned["planned"]}
    assert list(stored) == ["pilon", "nystrom", "svd"]
    for cell in compared["cells"]:
        if cell["method"] != "pilon":  # which drops primitives that no layer selected
            assert cell["ffn"]["stored"] == stored[cell["method"]]
        assert cell["ffn"]["stored"] <= stored[cell["method"]] <= 0.6 * cell["ffn"]["dense_stored"]


def test_json_has_the_promised_keys(compared):
    keys = "format_version pilon_compress source command output ratios methods seeds calibration kind evaluation dense "
    assert set(compared) == set(f"{keys} rows cells seconds journal".split())
    assert compared["source"] == "dense" and compared["output"] == "out" and compared["kind"] == "encoder"
    assert compared["command"] == f"pilon-compress {ENCODER} -o out --json"
    assert compared["calibration"]["data"] == "text.txt" and compared["calibration"]["texts"] == 32
    assert compared["evaluation"]["data"] == "text.txt (held-out part)" and compared["evaluation"]["texts"] > 10
    assert [cell["seed"] for cell in compared["cells"]] == [0, 0, 0, 1, 1, 1]
    sizes = {"stored_ratio", "bytes_ratio", "mac_ratio", "model_stored_ratio", "whitened_loss"}
    for row in compared["rows"]:
        assert set(row) == sizes | {"cosine", "neighbors10", "method", "ratio", "seeds"} and row["seeds"] == 2
        assert 0.5 < row["stored_ratio"]["mean"] <= 0.6 and 0 < row["mac_ratio"]["mean"] <= 1
        assert 0 < row["whitened_loss"]["mean"] < 1 and row["cosine"]["low"] < row["cosine"]["high"] < 1
    assert sorted(row["method"] for row in compared["rows"]) == ["nystrom", "pilon", "svd"]
    assert compared["dense"]["quality"]["cosine"] == pytest.approx(1)


def test_the_folder_holds_the_page_the_table_and_the_json(place, compared):
    out = place / "out"
    assert {p.name for p in out.iterdir()} == {"compare.html", "compare.md", "compare.json"}
    assert json.loads((out / "compare.json").read_text("utf-8")) == compared
    comparing.every_method()  # as in the process that wrote the page: methods have titles once they are registered
    assert (out / "compare.html").read_text("utf-8") == comparison_page.page(compared)
    assert not [p.name for p in place.iterdir() if p.name.startswith(".out")], "the cells are gone"


def test_pilon_is_what_convert_makes(inside, compared, tmp_path):
    asked = {"data": "text.txt", "samples": 32}
    asked = {"model": "dense", "seed": 1, "budget": {"ffn_ratio": 0.6}, "calibration": asked}
    report = pipeline.convert(conversion.build(asked), tmp_path / "converted").dump()
    (cell,) = [cell for cell in compared["cells"] if cell["method"] == "pilon" and cell["seed"] == 1]
    assert cell["whitened_loss"] == pytest.approx(report["whitened_loss"]["pilon"], rel=1e-4)
    assert cell["ffn"]["stored"] == report["ffn"]["stored"] and cell["ffn"]["macs"] == report["ffn"]["macs"]
    assert figures(report["evaluation"]) == pytest.approx(figures(cell["quality"]), rel=1e-4)


def test_pilon_is_what_convert_makes_of_a_language_model_too(inside, tmp_path):
    asked = settings().model_copy(update={"seed": 3})
    whole = comparing.compare(comparing.plan(asked, [0.6], ["pilon"], 1), tmp_path / "whole").dump()
    budget = asked.budget.model_copy(update={"ffn_ratio": 0.6})
    report = pipeline.convert(asked.model_copy(update={"budget": budget}), tmp_path / "converted").dump()
    (cell,) = whole["cells"]
    assert figures(report["evaluation"]) == pytest.approx(figures(cell["quality"]), rel=1e-4)


def test_a_killed_comparison_goes_on_where_it_stopped(cli, inside, tmp_path):
    dying = KILLED.replace("CELLS", "4"), *f"{CAUSAL} -o resumed".split()
    cli.python(*dying, cwd=inside, code=-signal.SIGKILL)
    assert not (inside / "resumed").exists()
    lines = (inside / ".resumed.partial" / "cells.jsonl").read_text().splitlines()
    kept = [json.loads(line)["cell"] for line in lines]
    assert len(kept) == 4, "the dense model's and three more"
    resumed = json.loads(cli(*f"{CAUSAL} -o resumed --json".split(), cwd=inside).stdout)
    assert [cell for cell in resumed["cells"] if cell in kept] == kept[1:], "times to the last digit: not made again"
    assert not (inside / ".resumed.partial").exists() and (inside / "resumed" / "compare.html").is_file()
    asked = comparing.plan(settings(), [0.5], ["svd", "asvd"], 2)
    whole = comparing.compare(asked, tmp_path / "whole").dump()
    for one, other in zip(resumed["cells"], whole["cells"], strict=True):
        assert figures(one["quality"]) == pytest.approx(figures(other["quality"]), rel=1e-5)
        assert (one["method"], one["seed"], one["ffn"]) == (other["method"], other["seed"], other["ffn"])
    assert len({cell["quality"]["perplexity"] for cell in whole["cells"]}) == 4, "every draw is another text"


def test_whole_numbers_are_compared_by_bytes(inside, tmp_path):
    names = ["pilon", "pilon-int3", "rtn-int4", "gptq-int4", "gptq-int3"]
    asked = comparing.plan(settings(), [0.8, 0.6], names, 1)
    assert asked.ratios == [1.0, 0.8, 0.6] and asked.describe().cells == 2 * 2 + 3
    result = comparing.compare(asked, tmp_path / "out").dump()
    rows = {(row["method"], row["ratio"]): row for row in result["rows"]}
    for one in asked.describe().dump()["planned"]:
        size = rows[one["method"], one["ratio"]]["bytes_ratio"]["mean"]
        assert one["bytes_ratio"] == pytest.approx(size, rel=0.05 if "pilon" in one["method"] else 1e-9), one
    assert set(rows) == {*((m, r) for m in names[:2] for r in (0.8, 0.6)), *((m, 1.0) for m in names[2:])}
    size = {key: row["bytes_ratio"]["mean"] for key, row in rows.items()}
    assert size["rtn-int4", 1.0] == size["gptq-int4", 1.0] > size["gptq-int3", 1.0] > size["pilon-int3", 0.8]
    assert size["pilon-int3", 0.6] < size["pilon-int3", 0.8] < 0.5 * size["pilon", 0.8]
    lost = {key: row["kl"]["mean"] for key, row in rows.items()}
    assert 0 < lost["gptq-int4", 1.0] < lost["gptq-int3", 1.0]
    made = (tmp_path / "out" / "compare.md").read_text()
    assert "bytes ÷ dense" in made and "| GPTQ, int3 |" in made and "## Stored FFN ratio 1" in made
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<dt>GPTQ</dt>") == 1 and "<dt>round to nearest</dt>" in page
    assert "compare them by bytes" in page


def test_a_failure_while_writing_keeps_the_earlier_comparison_and_the_cells(inside, tmp_path, monkeypatch):
    asked = comparing.plan(settings(), [0.5], ["svd"], 1)
    first = comparing.compare(asked, tmp_path / "out").dump()
    with pytest.raises(BadInput, match="not empty"):
        comparing.compare(asked, tmp_path / "out")

    def full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as broken, pytest.raises(Exception, match="the disk is full"):
        broken.setattr(comparison_page, "write", full)
        comparing.compare(asked, tmp_path / "out", overwrite=True)
    rename = Path.rename
    with monkeypatch.context() as broken, pytest.raises(Exception, match="the disk is full"):
        broken.setattr(
            Path, "rename", lambda p, to: full() if p.suffix == ".part" and to.name == "out" else rename(p, to)
        )
        comparing.compare(asked, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "compare.json").read_text("utf-8")) == first
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.partial"}
    with monkeypatch.context() as broken:
        broken.setattr(comparing, "baseline", full)  # every cell is there already
        again = comparing.compare(asked, tmp_path / "out", overwrite=True).dump()
    assert again["cells"] != first["cells"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_clears_nothing_but_a_comparison(place):
    with pytest.raises(BadInput, match="holds no comparison"):
        check_output(place / "full", overwrite=True, kind="comparison")
    with pytest.raises(BadInput, match=r"text\.txt is a file"):
        check_output(place / "text.txt", overwrite=True, kind="comparison")
