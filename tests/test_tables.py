"""Check tables and help at the width of a terminal: no word or figure cut, totals at the end."""

import json
import os
import pty
import re
import sys

import pytest

from pilon_compress.cli import output
from pilon_compress.cli.output import print_table, say
from pilon_compress.cli.part_table import SCREEN, print_parts
from pilon_compress.config.budget import Budget
from pilon_compress.convert.allocate.uniform import make_plan
from pilon_compress.convert.plan import Plan, trimmed
from pilon_compress.convert.prepare import describe_plan
from pilon_compress.models.families import find_sites


@pytest.fixture(scope="module")
def terminal():
    """`terminal(columns, *words)`: what the command prints into a pseudo-terminal of that width, as lines."""

    def terminal(columns, *words):
        child, descriptor = pty.fork()
        if child == 0:
            os.environ.update(COLUMNS=str(columns), NO_COLOR="1")
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["pilon-compress", *map(str, words)]
            try:
                from pilon_compress.cli.main import main

                main()
            except BaseException:
                pass
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(0)
        shown = b""
        while True:
            try:
                part = os.read(descriptor, 65536)
            except OSError:  # the other side is closed
                part = b""
            if not part:
                break
            shown += part
        os.waitpid(child, 0)
        return shown.decode().replace("\r\n", "\n").rstrip("\n").split("\n")

    return terminal


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Config files alone: `dense` of 30 layers, `same` with shared banks, `other` with layers of unlike widths."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny.tiny_model("llama", num_hidden_layers=30)
    model.config.architectures = ["LlamaForCausalLM"]
    sites = find_sites(model)
    shared = make_plan(sites, Budget(ffn_ratio=0.5), "pilon", "component")
    uneven = Plan(0.5, [[layer] for layer in range(30)], [], [trimmed(s, 20 + s.layer, 64) for s in sites])
    uneven.host.update({site.name: (site.d_in, site.d_out) for site in sites})
    layouts = {"dense": None, "same": shared.layout("int4"), "other": uneven.layout()}
    for name, layout in layouts.items():
        model.config.save_pretrained(folder / name)
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        if layout is not None:
            config["quantization_config"] = {"quant_method": "pilon", "layout": layout.to_dict()}
        path.write_text(json.dumps(config))
    judged = {"kind": "causal", "perplexity": 20.5, "dense_perplexity": 18.25, "data": "held.txt"}
    (folder / "other" / "report.json").write_text(json.dumps({"evaluation": judged, "source_dtype": "bfloat16"}))
    return folder


def words_of(lines):
    """Words and figures without the punctuation around them, and without names that lost their beginning."""
    found = {word.strip(".,:;()") for line in lines for word in line.split() if "…" not in word}
    return {word for word in found if set(word) != {"─"}}


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("name", ["dense", "same", "other"])
def test_inspect_fits_the_terminal_and_cuts_no_word(terminal, models, name, columns):
    wide = words_of(terminal(400, "inspect", models / name))
    lines = terminal(columns, "inspect", models / name)
    assert max(map(len, lines)) <= columns or any(str(models) in line for line in lines if len(line) > columns)
    assert len(lines) <= 45, "a screen or so: layers are folded"
    assert words_of(lines) - wide <= {"No", "room", "for"}, "no word that is part of another"
    totals = [line.split()[0] for line in lines if re.match(r"(all (gate|up|down)|total) ", line)]
    assert totals == ["all", "all", "all", "total"]


def test_equal_layers_are_joined_and_verbose_shows_each(terminal, models):
    joined = terminal(120, "inspect", models / "dense")
    assert any(line.startswith("layers.0–29.mlp.up_proj ") for line in joined)
    every = terminal(120, "inspect", models / "dense", "--verbose")
    assert sum(line.startswith("layers.") for line in every) == 90


def test_inspect_of_a_converted_folder_shows_what_is_stored(cli, terminal, models):
    shown = json.loads(cli("inspect", models / "other", "--json").stdout)
    assert [entry["neurons"] for entry in shown["projections"] if entry["role"] == "down"] == list(range(20, 50))
    assert shown["evaluation"]["perplexity"] == 20.5 and shown["source_dtype"] == "bfloat16"
    assert shown["ffn"]["bytes_ratio_to_source"] == shown["ffn"]["bytes"] / (2 * shown["ffn"]["dense_stored"])
    lines = terminal(120, "inspect", models / "other", "--verbose")
    assert any(line.startswith("layers.7.mlp.down_proj") and "27→32" in line for line in lines)
    assert any("Perplexity" in line and "20.5" in line and "18.2" in line for line in lines)
    whole = json.loads(cli("inspect", models / "same", "--json").stdout)
    assert {(entry["quantization"], entry["bits"]) for entry in whole["projections"]} == {("int4", 4.0)}
    assert all(entry["rank"] and entry["n_primitives"] for entry in whole["projections"])
    table = terminal(200, "inspect", models / "same")
    assert any(line.startswith("total") and " int4 " in line for line in table)


def test_bytes_of_a_dense_model_are_those_of_its_file(cli, models, tmp_path):
    config = json.loads((models / "dense" / "config.json").read_text())
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        folder = tmp_path / dtype
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        shown = json.loads(cli("inspect", folder, "--json").stdout)
        assert shown["dtype"] == dtype
        assert all(entry["bytes"] == itemsize * entry["parameters"] for entry in shown["projections"])


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("words", [("--help",), ("convert", "--help"), ("compare", "-h"), ("train", "-h")])
def test_help_fits_and_cuts_no_word(terminal, words, columns):
    lines = terminal(columns, *words)
    assert max(map(len, lines)) <= columns
    wide = words_of(terminal(82, *words))
    assert words_of(lines) <= wide


# --- plans


@pytest.fixture
def plan(tiny):
    """The parts of a plan for 30 layers, all alike or not."""

    def plan(alike):
        sites = find_sites(tiny.tiny_model("llama", num_hidden_layers=30))
        kept = [trimmed(site, 32 if alike else 20 + site.layer, 64) for site in sites]
        made = Plan(0.5, [[layer] for layer in range(30)], [], kept, {s.name: (s.d_in, s.d_out) for s in sites})
        return describe_plan(made, 4).dump()["banks"]

    return plan


@pytest.mark.parametrize("alike", [True, False])
def test_a_plan_of_many_layers_fits_a_screen_and_ends_with_totals(capsys, monkeypatch, plan, alike):
    monkeypatch.setattr(output, "terminal_width", lambda: 80)
    parts = plan(alike)
    print_parts("Plan", parts, "float32")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) <= 80
    assert any(line.startswith("up 0–29 ") for line in lines) == alike
    assert any("--verbose" in line for line in lines) != alike
    (total,) = [line for line in lines if line.startswith("total ")]
    ratio = sum(part["stored"] for part in parts) / sum(part["dense_stored"] for part in parts)
    assert f"{ratio:.3f}" in total.split()
    print_parts("Plan", parts, "float32", verbose=True)
    assert len(capsys.readouterr().out.splitlines()) >= 90


def test_headings_wrap_at_spaces_and_columns_go_before_figures_break(capsys, monkeypatch):
    monkeypatch.setattr(output, "terminal_width", lambda: 30)
    columns = ["name of the row", "stored ÷ dense", "whole numbers", "MACs"]
    print_table("T", columns, [["first", "0.123456", "1,234,567", "0.5"]], optional=["whole numbers"])
    shown = capsys.readouterr().out
    assert "0.123456" in shown and "1,234,567" not in shown and "No room for: whole numbers." in shown
    assert max(map(len, shown.splitlines())) <= 30


def test_a_pipe_gets_every_column(capsys):
    print_table("T", ["a", "b"], [["x" * 100, "y" * 100]])
    say("word " * 60)
    shown = capsys.readouterr().out
    assert "x" * 100 in shown and "y" * 100 in shown and "No room" not in shown
    assert max(map(len, shown.splitlines())) > 250
