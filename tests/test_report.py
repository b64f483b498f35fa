"""The report page: self-contained, complete, escaped, the same bytes every time, for every kind of conversion."""

import copy
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pilon_compress.report import formatting
from pilon_compress.report.conversion_page import render, write_report

SIZES = {"gate": (512, 2048), "up": (512, 2048), "down": (2048, 512)}
KEPT_RANK = 204
COMPARED = {"pilon": ["pilon", "whitened-svd", "svd"], "whitened-svd": ["whitened-svd", "svd"], "svd": ["svd"]}
EVALUATIONS: dict[str | None, dict[str, Any] | None] = {
    "encoder": {"cosine": 0.8963, "neighbors10": 0.6912, "texts": 487, "data": "stdlib:docstrings", "kind": "encoder"},
    "causal": {
        "perplexity": 48.06,
        "dense_perplexity": 43.21,
        "perplexity_ratio": 1.1122,
        "bits_per_byte": 1.0731,
        "dense_bits_per_byte": 1.0437,
        "kl": 0.10467,
        "top1_agreement": 0.8713,
        "tokens": 245_569,
        "bytes": 1_288_540,
        "window": 1024,
        "stride": 512,
        "eos": True,
        "data": "hub:Salesforce/wikitext:wikitext-2-raw-v1:test:text",
        "kind": "causal",
    },
    None: None,
}


def fake_plan(band: int, role: str, layers: list[int], method: str) -> dict[str, Any]:
    d_in, d_out = SIZES[role]
    shared = method == "pilon"
    rank = 8 if shared else KEPT_RANK
    n = KEPT_RANK * len(layers) // rank if shared else 1
    k = n * 2 // 3 if shared else 1
    return {
        "band": band,
        "role": role,
        "layers": layers,
        "d_in": d_in,
        "d_out": d_out,
        "n_primitives": n,
        "rank": rank,
        "top_k": k,
        "composition": "component",
        "stored": n * rank * (d_in + d_out) + len(layers) * k * rank,
        "dense_stored": len(layers) * d_in * d_out,
        "macs": len(layers) * k * rank * (d_in + d_out + 1),
        "dense_macs": len(layers) * d_in * d_out,
    }


def fake_use(plan: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
    n, k = plan["n_primitives"], plan["top_k"]
    energy = random.lognormal(0, 1.5, (len(plan["layers"]), n))
    for row in energy:
        row[np.argsort(row)[: n - k]] = 0.0
    share = energy / energy.sum(1, keepdims=True)
    logs = np.log(np.where(share > 0, share, 1.0))
    return {
        "band": plan["band"],
        "role": plan["role"],
        "layers": plan["layers"],
        "energy": energy.tolist(),
        "entropy": (-(share * logs).sum(1) / np.log(max(n, 2))).tolist(),
        "gini": (np.abs(share[:, :, None] - share[:, None]).sum((1, 2)) / (2 * n)).tolist(),
        "selected_share": (energy > 0).mean(0).tolist(),
        "utilisation": float((energy > 0).any(0).mean()),
    }


def fake_projection(
    plan: dict[str, Any], layer: int, layers: int, method: str, random: np.random.Generator
) -> dict[str, Any]:
    width = min(plan["d_in"], plan["d_out"])
    index = np.unique(np.geomspace(1, width, 128).astype(int))
    energy = np.arange(1, width + 1) ** -(1.1 + 0.6 * layer / layers) * np.exp(-np.arange(width) / width * 3)
    error = 0.15 + 0.1 * float(random.random()) + 0.1 * (plan["role"] == "down")
    errors = {"svd": 2.4 * error, "whitened-svd": 1.12 * error, "pilon": error}
    return {
        "name": f"encoder.layer.{layer}.{plan['role']}.dense",
        "layer": layer,
        "role": plan["role"],
        "band": plan["band"],
        "relative_error": {name: errors[name] for name in COMPARED[method]},
        "spectrum": {"index": index.tolist(), "energy": (energy / energy.sum())[index - 1].tolist()},
        "cut": KEPT_RANK + 5 * (layer * 7 % 11) - 25,
    }


def fake_report(
    layers: int = 6, bands: int = 2, method: str = "pilon", kind: str | None = "encoder", gated: bool = False
) -> dict[str, Any]:
    """A report as `convert` makes it, with plausible figures; the same arguments give the same report."""
    random = np.random.default_rng(layers * 100 + bands)
    roles = ["gate", "up", "down"] if gated else ["up", "down"]
    groups = np.array_split(np.arange(layers), bands if method == "pilon" else layers)
    members = [[int(layer) for layer in group] for group in groups]
    plan = [fake_plan(band, role, group, method) for role in roles for band, group in enumerate(members)]
    use = [fake_use(bank, random) for bank in plan]
    projections = [fake_projection(bank, layer, layers, method, random) for bank in plan for layer in bank["layers"]]
    sizes = {key: sum(bank[key] for bank in plan) for key in ("stored", "dense_stored", "macs", "dense_macs")}
    kept = {"embeddings": 15_627_264, "attention": layers * 1_050_624, "norms": layers * 2_048 + 1_024}
    losses = {"pilon": 0.03127, "whitened-svd": 0.03981, "svd": 0.2214}
    return {
        "format_version": 1,
        "dtype": "float32",
        "pilon_compress": "0.1.0",
        "command": "pilon-compress convert acme/small-model -o out/x --ffn-ratio 0.5 --calibration stdlib --seed 0",
        "source": "acme/small-model",
        "method": method,
        "output": "out/x",
        "plan": {"ratio": 0.5, "ffn_ratio": 0.5, "bands": members, "banks": plan},
        "ffn": with_ratios(sizes),
        "model": with_ratios({key: value + sum(kept.values()) for key, value in sizes.items()}),
        "whitened_loss": {name: losses[name] for name in COMPARED[method]},
        "projections": projections,
        "banks": use,
        "kept": [
            {"name": name, "parameters": count, "share": count / sum(kept.values())} for name, count in kept.items()
        ],
        "calibration": {"data": "stdlib", "texts": 512, "tokens": 40_321},
        "evaluation": EVALUATIONS[kind],
        "seconds": 41.23,
        "peak_rss_gib": 1.437,
        "recipe": "model: acme/small-model\nmethod: pilon\nbudget:\n  ffn_ratio: 0.5\n",
    }


def with_ratios(sizes: dict[str, int]) -> dict[str, Any]:
    sizes = sizes | {"bytes": 2 * sizes["stored"] + 4096, "dense_bytes": 2 * sizes["dense_stored"]}
    return sizes | {
        "stored_ratio": sizes["stored"] / sizes["dense_stored"],
        "bytes_ratio": sizes["bytes"] / sizes["dense_bytes"],
        "mac_ratio": sizes["macs"] / sizes["dense_macs"],
    }


class Page(HTMLParser):
    """Parser of a page into what a browser would load, run and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.shown = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.shown += data


CASES = [
    pytest.param({"layers": 6, "bands": 2, "kind": "encoder"}, id="encoder"),
    pytest.param({"layers": 6, "bands": 2, "kind": "causal", "gated": True}, id="causal"),
    pytest.param({"layers": 4, "bands": 4, "kind": None}, id="one-layer-bands-not-evaluated"),
    pytest.param({"layers": 1, "bands": 1, "kind": "encoder"}, id="one-layer-model"),
    pytest.param({"layers": 6, "method": "svd", "kind": "causal"}, id="svd"),
    pytest.param({"layers": 6, "method": "whitened-svd", "kind": "encoder"}, id="whitened-svd"),
]


@pytest.mark.parametrize("case", CASES)
def test_page_is_self_contained_and_shows_every_headline_number(case: dict[str, Any]) -> None:
    report = fake_report(**case)
    text = render(report)
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert not page.handlers
    assert all(target.startswith(("#", "data:image/png;base64,")) or target == "report.json" for target in page.loads)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids)), "an id that occurs twice makes one plot borrow another's shapes"
    assert {target[1:] for target in page.loads if target.startswith("#")} <= set(page.ids)
    expected = [
        formatting.number(report[part][key]) for part in ("ffn", "model") for key in report[part] if "ratio" in key
    ]
    expected += [formatting.number(loss) for loss in report["whitened_loss"].values()]
    expected += [formatting.number(part["parameters"]) for part in report["kept"]]
    expected += [formatting.number(v) for v in (report["evaluation"] or {}).values() if isinstance(v, float)]
    expected += [report["command"], report["source"], "41.2 s", "1.44 GiB", "40,321", "512"]
    expected += [line for line in report["recipe"].splitlines()]
    assert [value for value in expected if value not in page.shown] == []
    assert ("not measured" in page.shown) == (report["evaluation"] is None)


def test_plots_are_well_formed_and_one_per_question() -> None:
    plots = re.findall(r"<svg.*?</svg>", render(fake_report()), flags=re.DOTALL)
    labels = [ET.fromstring(plot).attrib["aria-label"] for plot in plots]
    assert len(labels) == len(set(labels)) == 3


def test_every_measured_point_and_cut_is_drawn_and_no_other() -> None:
    """Points are counted in the drawing: one fewer measurement is one mark fewer."""

    def marks(report: dict[str, Any], plot: str) -> int:
        drawing = re.search(rf'<svg[^>]*aria-label="{plot}.*?</svg>', render(report), flags=re.DOTALL)
        assert drawing
        return drawing[0].count("<use ")

    report = fake_report(layers=5, bands=1, gated=True)
    poorer = copy.deepcopy(report)
    poorer["projections"][2]["relative_error"]["svd"] = None
    poorer["projections"][2]["cut"] = 0
    for plot in ("Relative output error", "Singular spectra"):
        assert marks(poorer, plot) == marks(report, plot) - 1


def test_plots_hold_extreme_values() -> None:
    report = fake_report(layers=2, bands=1)
    for projection in report["projections"]:
        projection["relative_error"] = {"pilon": 0.0, "svd": 0.0}
        projection["spectrum"] = {"index": [1, 2, 3], "energy": [1.0, 0.0, 0.0]}
    assert "Layer by layer" in render(report)
    report["projections"][0]["relative_error"] = {"pilon": 3e-7, "svd": 0.8}
    report["projections"][0]["spectrum"] = {"index": [1], "energy": [1e-300]}
    text = render(report)
    assert "mathdefault" not in text and "nan" not in re.findall(r"[a-z]+", text)


def test_hostile_names_are_text_and_nothing_else() -> None:
    report = fake_report()
    evil = '</title></style><script>alert(1)</script><img src=x onerror=alert(1)>$\\frac{$ & "quoted"'
    report |= {"source": evil, "output": evil, "command": evil, "recipe": evil, "method": evil}
    report["whitened_loss"] = {evil: 0.1} | report["whitened_loss"]
    report["calibration"]["data"] = evil
    report["evaluation"] = dict(report["evaluation"], data=evil)
    report["kept"][0]["name"] = evil
    for bank in (*report["banks"], *report["plan"]["banks"], *report["projections"]):
        bank["role"] = evil
    for projection in report["projections"]:
        projection["relative_error"][evil] = 0.1
    page = Page(render(report))
    assert not page.tags & {"script", "img"}
    assert not page.handlers
    assert evil in page.shown


def test_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    report = fake_report(kind="causal", gated=True)
    write_report(report, tmp_path / "a")
    write_report(copy.deepcopy(report), tmp_path / "b")
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["report.html", "report.json"]


def test_json_round_trips_and_stays_legible(tmp_path: Path) -> None:
    report = fake_report()
    report["recipe"] = 'text: "[ 1, 2 ]"\nname: Größe – 大\n[\n1,\n  2\n]'
    write_report(report, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert "[0, 1, 2]" in text


def test_figures_that_are_not_finite_become_null_and_say_so(tmp_path: Path) -> None:
    report = fake_report(kind="causal")
    report["evaluation"] = dict(report["evaluation"], perplexity=float("inf"), kl=float("nan"))
    report["projections"][0]["relative_error"]["svd"] = float("nan")
    report["projections"][0]["spectrum"]["energy"][5] = float("nan")
    report["banks"][0]["energy"][0][0] = float("nan")
    report["whitened_loss"]["svd"] = float("inf")
    write_report(report, tmp_path)
    loaded = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert loaded["evaluation"]["perplexity"] is None
    assert loaded["whitened_loss"]["svd"] is None
    assert "nan" not in Page((tmp_path / "report.html").read_text(encoding="utf-8")).shown.lower().split()


def test_a_large_model_stays_a_small_page() -> None:
    text = render(fake_report(layers=32, bands=8, kind="causal", gated=True))
    assert len(text.encode()) < 1_500_000


def test_methods_without_banks_or_spectra_are_reported_too() -> None:
    report = fake_report(method="svd", kind=None)
    report["banks"] = []
    for projection in report["projections"]:
        projection["spectrum"] = {"index": [], "energy": []}
    shown = Page(render(report)).shown
    assert "there is nothing to compose" in shown
    assert "No spectra were recorded." in shown


def test_more_work_than_dense_is_said() -> None:
    report = fake_report()
    assert "more than dense" not in Page(render(report)).shown
    report["ffn"]["mac_ratio"] = 1.327
    shown = Page(render(report)).shown
    assert "1.33" in shown and "more than dense" in shown
