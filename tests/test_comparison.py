"""Rows, tables and the page of a comparison, from cells whose figures are known beforehand."""

import json
import re
from functools import cache
from html.parser import HTMLParser

import pytest

from pilon_compress.compare.run import every_method
from pilon_compress.report import comparison_page
from pilon_compress.report.methods import method_of

KNOWN = every_method()  # reading the registry has every method register its title, explanation and look
DENSE_SIZE = {"stored_ratio": 1.0, "bytes_ratio": 1.0, "mac_ratio": 1.0, "stored": 1000, "dense_stored": 1000}
PERFECT = {
    "encoder": {"kind": "encoder", "cosine": 1.0, "neighbors10": 1.0, "texts": 87, "data": "judged.txt"},
    "causal": {
        **{"kind": "causal", "perplexity": 20.0, "perplexity_ratio": 1.0, "kl": 0.0, "top1_agreement": 1.0},
        **{"tokens": 4321, "bytes": 9999, "bits_per_byte": 1.2, "data": "judged.txt"},
    },
}
# method -> the figure that rows are sorted by, at ratio 0.6 and 0.4, for three seeds each
FIGURES = {
    "encoder": {
        "svd": [[0.60, 0.62, 0.64], [0.41, 0.42, 0.43]],
        "pilon": [[0.92, 0.97, 0.90], [0.70, 0.75, 0.80]],
        "nystrom": [[0.91, 0.95, 0.96], [0.65, 0.66, 0.67]],
    },
    "causal": {
        "svd": [[9.0, 10.0, 8.0], [90.0, 80.0, 100.0]],
        "pilon": [[1.2, 1.1, 1.3], [2.0, 2.1, 2.2]],
        "nystrom": [[1.25, 1.15, 1.05], [3.0, 3.1, 3.5]],
    },
}


def cell(kind, method, ratio, seed, value):
    quality = dict(PERFECT[kind])
    quality |= {"cosine": value, "neighbors10": value - 0.1} if kind == "encoder" else {"perplexity_ratio": value}
    sizes = {**DENSE_SIZE, "stored_ratio": ratio - 0.001, "bytes_ratio": ratio + 0.002, "mac_ratio": ratio / 2}
    model = {**sizes, "stored_ratio": 0.9}
    return {
        **{"method": method, "ratio": ratio, "seed": seed, "ffn": sizes, "model": model},
        **{"whitened_loss": 0.25, "fit_seconds": 1.0, "quality": quality},
    }


def make_result(kind="encoder", seeds=3, methods=("svd", "pilon", "nystrom"), source="some/model"):
    cells = [
        cell(kind, method, ratio, seed, FIGURES[kind][method][place][seed])
        for seed in range(seeds)
        for method in methods
        for place, ratio in enumerate((0.6, 0.4))
    ]
    dense = {"ffn": DENSE_SIZE, "model": DENSE_SIZE, "whitened_loss": 0.0, "quality": PERFECT[kind]}
    return {
        **{
            "format_version": 1,
            "pilon_compress": "9.9",
            "source": source,
            "command": f"pilon-compress compare {source}",
        },
        **{"output": "out", "ratios": [0.6, 0.4], "methods": list(methods), "seeds": list(range(seeds))},
        **{"calibration": {"data": "read.txt", "texts": 345, "tokens": 67890}, "cells": cells, "seconds": 2.0},
        **comparison_page.summarise(cells, dense),
    }


@cache
def page_of(kind="encoder", seeds=3):
    return comparison_page.page(make_result(kind, seeds))


class Page(HTMLParser):
    """Parser of a page into tags with attributes, the rows of every table, and the running text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.rows, self.words, self.open = [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "path", "use", "img", "rect", "circle", "line"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, "elements close in order"

    def handle_data(self, data):
        if self.open[-1:] in (["style"], ["title"]):
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()


def test_a_row_has_the_mean_and_the_range_over_seeds():
    rows = {(row["method"], row["ratio"]): row for row in make_result()["rows"]}
    assert len(rows) == 6 and {row["seeds"] for row in rows.values()} == {3}
    assert rows["pilon", 0.6]["cosine"] == {"mean": pytest.approx(0.93), "low": 0.90, "high": 0.97}
    assert rows["svd", 0.4]["cosine"] == {"mean": pytest.approx(0.42), "low": 0.41, "high": 0.43}
    assert rows["svd", 0.4]["neighbors10"]["mean"] == pytest.approx(0.32)
    sizes = [rows["svd", 0.4][key]["mean"] for key in ("stored_ratio", "bytes_ratio", "mac_ratio")]
    assert sizes == pytest.approx([0.399, 0.402, 0.2])
    assert rows["svd", 0.4]["model_stored_ratio"]["mean"] == pytest.approx(0.9)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_the_largest_ratio_and_the_best_method_come_first(kind):
    order = [(row["ratio"], row["method"]) for row in make_result(kind)["rows"]]
    assert order[:3] == [(0.6, "nystrom"), (0.6, "pilon"), (0.6, "svd")]
    assert order[3:] == [(0.4, "pilon"), (0.4, "nystrom"), (0.4, "svd")]


def test_the_markdown_table_has_every_figure_with_its_range():
    text = comparison_page.markdown(make_result())
    blocks = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n## ")[1:]]
    tables = [[[x.strip() for x in line.strip("|").split("|")] for line in block] for block in blocks]
    assert [len(table) for table in tables] == [6, 6], "headings, rule, three methods, dense; for both ratios"
    assert len({len(row) for table in tables for row in table}) == 1
    assert tables[0][0] == ["method", "stored ÷ dense", "MACs ÷ dense", "whitened loss", *tables[0][0][4:]]
    assert tables[0][2][0] == "Nyström neurons (MoDeGPT)"
    assert tables[0][3] == ["PILON", "0.599", "0.300", "0.250", "0.930 (0.900–0.970)", "0.830 (0.800–0.870)"]
    assert tables[1][4][0] == "plain SVD" and tables[1][4][4] == "0.420 (0.410–0.430)"
    assert [table[-1] for table in tables] == [["dense", "1.00", "1.00", "0", "1.00", "1.00"]] * 2
    assert "345 texts of read.txt (67,890 tokens)" in text and "87 texts of judged.txt" in text
    assert "3 calibration draws" in text and "```sh\npilon-compress compare some/model\n```" in text


def test_a_causal_model_is_judged_by_perplexity_on_tokens():
    text = comparison_page.markdown(make_result("causal"))
    assert "| perplexity ÷ dense | KL to dense, nats | top-1 agreement |" in text
    assert "345 blocks of read.txt" in text and "4,321 tokens of judged.txt" in text
    assert "| 9.00 (8.00–10.0) |" in text


def test_one_draw_has_no_range():
    result = make_result(seeds=1)
    text = comparison_page.markdown(result)
    assert "one calibration draw" in text and not re.search(r"\d–\d", text)
    assert "Bars:" not in page_of(seeds=1) and "Bars:" in page_of()
    headings, rows = comparison_page.terminal_table(result, 0.6)
    assert not any(row[headings.index("over draws")] for row in rows), "an empty column, which the terminal leaves out"


def test_the_terminal_puts_the_range_beside_its_figure():
    headings, rows = comparison_page.terminal_table(make_result(), 0.6)
    place = headings.index("cosine to dense")
    assert headings[place + 1] == "over draws" and len(headings) == len(rows[0]) == len(rows[-1])
    assert rows[1][place : place + 3] == ["0.930", "0.900–0.970", "0.830"]
    assert rows[-1][0] == "dense" and rows[-1][place + 1] == ""


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_the_page_holds_the_table_and_the_plots(kind):
    result = make_result(kind)
    page = Page(page_of(kind))
    assert page.open == [], "every element is closed"
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2
    for place, ratio in enumerate((0.6, 0.4)):
        headings, rows = comparison_page.table(result, ratio)
        shown = page.rows[5 * place : 5 * place + 5]
        assert shown[0] == headings
        assert [[x.replace("(", "").replace(")", "") for x in row] for row in rows] == [
            [x.replace("(", "").replace(")", "") for x in row] for row in shown[1:]
        ]
    for method in ("svd", "pilon", "nystrom"):
        assert f"{method_of(method).title} {method_of(method).curve.about}" in page.text
    assert "pilon-compress compare some/model" in page.text and "345" in page.text
    assert ("lower is better" if kind == "causal" else "higher is better") in page.text


def test_the_page_runs_nothing_and_loads_nothing():
    html = comparison_page.page(make_result(source='<script>alert(1)</script>"onload=x'))
    page = Page(html)
    assert "<script>alert(1)</script>" in page.text, "shown as text"
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "form", "base", "img"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href", "src"):
            assert attributes.get(name, "#").startswith("#") or attributes[name] == "compare.json"
    assert not re.search(r"url\((?!#)|@import", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "two plots on one page"


def test_the_page_names_a_leader_only_where_the_draws_agree():
    lead = page_of().split('class="lead">')[1].split("</p>")[0]
    first, second = lead.split(" At 0.4 ")
    assert "are level over the calibration draws" in first, "0.91–0.96 and 0.90–0.97"
    assert "PILON (0.750 at 0.200 of the MACs) leads, then Nyström neurons (MoDeGPT) (0.660" in second
    alone = comparison_page.page(make_result(methods=["pilon"]))
    assert "PILON (0.930 at 0.300 of the MACs) leads." in alone


def test_the_same_result_is_the_same_page():
    assert comparison_page.page(make_result()) == page_of()


def test_a_method_without_a_look_of_its_own_is_still_shown():
    result = make_result()
    for row in result["rows"]:
        row["method"] = row["method"].replace("svd", "pilon-new<")
    page = Page(comparison_page.page(result))
    assert [row[0] for row in page.rows if row[0].startswith("pilon-new")] == ["pilon-new<"] * 2


def test_the_three_files(tmp_path):
    result = make_result()
    comparison_page.write(result, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"compare.json", "compare.html", "compare.md"}
    assert json.loads((tmp_path / "compare.json").read_text("utf-8")) == result
    assert (tmp_path / "compare.html").read_text("utf-8") == page_of()
    assert (tmp_path / "compare.md").read_text("utf-8") == comparison_page.markdown(result)
