"""Measure what sharing does in conversion: every form at equal stored numbers, one-shot, healed, and as digits.

    python benchmarks/sharing_conversion.py MODEL --name "small Llama" --text stdlib --ratios 0.4 0.2 --tokens 200000 \
        [--seeds 1] [--only neuron] [--stages one-shot healed ternary] [--convert "--samples 128 ..."] [--heal "..."]

Every row is what a user runs: `convert`, then `train --heal` (and `--ternary`), judged by `eval` on text that neither
has seen. Rows go to docs/results/sharing_conversion.json, and those that are there are not run again.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sharing_conversion.json"
ARMS: dict[str, list[str]] = {
    "no sharing (default)": ["--share", "none"],
    "private factors": ["--share", "none", "--set", "budget.neurons=false"],
    "shared factors": ["--share", "always"],
    "shared factors, MACs 2x": ["--share", "always", "--mac-ratio", "{twice}"],
    "auto": ["--share", "auto"],
    "neuron bank": ["--share", "always", "--primitive", "neurons"],
    "neuron bank, MACs 2x": ["--share", "always", "--primitive", "neurons", "--mac-ratio", "{twice}"],
}
STAGES = ("one-shot", "healed", "ternary")
MORE = {"healed": [], "ternary": ["--ternary", "--set", "ternary.after=0", "--learning-rate", "2e-2"]}
KEPT = ("perplexity_ratio", "kl", "cosine", "neighbors10", "dense_perplexity")


def command(*words: str) -> dict[str, Any]:
    """Run `pilon-compress WORDS --json` and return what it prints. Exits with its message where it fails."""
    asked = [sys.executable, "-m", "pilon_compress.cli", *words, "--json"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def known() -> list[dict[str, Any]]:
    """Return the rows that are on record."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []


def record(row: dict[str, Any]) -> None:
    """Add a row to the record, which other processes may be writing, too."""
    rows = [*known(), row]
    order = {name: place for place, name in enumerate([*STAGES, *ARMS])}
    rows.sort(key=lambda one: (one["model"], -one["asked"], order[one["stage"]], order[one["arm"]], one["seed"]))
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps(row), flush=True)


def measured(folder: str, dense: str, evaluation: list[str]) -> dict[str, Any]:
    """Return quality and sizes of a folder beside the dense model."""
    told = command("eval", folder, "--against", dense, *evaluation)
    found = {name: told[name] for name in KEPT if told.get(name) is not None}
    ffn = command("inspect", folder)["ffn"]
    return {**found, **{name: ffn.get(name) for name in ("stored_ratio", "mac_ratio", "bytes", "shared_primitives")}}


def run(arm: str, asked: float, seed: int, options: argparse.Namespace) -> None:
    """Convert once, and go through the stages whose rows are missing."""
    head = {"model": options.name, "asked": asked, "arm": arm, "seed": seed}
    missing = [
        stage for stage in options.stages if not any({**head, "stage": stage}.items() <= r.items() for r in known())
    ]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/converted"
        form = [word.format(twice=min(1.0, 2 * asked)) for word in ARMS[arm]]
        words = [options.model, "--ffn-ratio", str(asked), *form, "--calibration", options.text, "--seed", str(seed)]
        if "ternary" in missing and "neurons" not in form:  # a bank of neurons has no ranks
            words += ["--rank-multiple", "16"]
        command("convert", *words, "--eval-data", "none", *shlex.split(options.convert), "-o", made)
        for stage in missing:
            place, tokens = made, 0
            if stage != "one-shot":
                place, tokens = f"{folder}/{stage}", options.tokens
                words = ["--heal", made, "--teacher", options.model, "--data", options.text, "--tokens", str(tokens)]
                command("train", *words, *MORE[stage], *shlex.split(options.heal), "-o", place)
            record(
                {**head, "stage": stage, "tokens": tokens, **measured(place, options.model, shlex.split(options.eval))}
            )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: mean (range) of the draws."""
    lines = [
        "| model | asked | stage | form | stored | MACs | FFN bytes | quality, mean (range) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = list(dict.fromkeys((r["model"], r["asked"], r["stage"], r["arm"]) for r in rows))
    for key in keys:
        mine = [r for r in rows if (r["model"], r["asked"], r["stage"], r["arm"]) == key]
        shown = []
        for name in ("perplexity_ratio", "cosine", "neighbors10"):
            values = [r[name] for r in mine if name in r]
            if values:
                span = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
                shown.append(f"{mean(values):.3f}{span}")
        sizes = [f"{mean(r[name] for r in mine):.3f}" for name in ("stored_ratio", "mac_ratio")]
        bytes_ = f"{mean(r['bytes'] for r in mine):,.0f}"
        lines.append(f"| {' | '.join([*map(str, key), *sizes, bytes_, ' / '.join(shown)])} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="dense model; none: print the table of what is on record")
    parser.add_argument("--name", help="name of the model in the table")
    parser.add_argument("--text", default="stdlib", help="text to calibrate and heal on")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.2])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="forms whose name contains this")
    parser.add_argument("--stages", nargs="+", default=["one-shot", "healed"], choices=STAGES)
    for name in ("convert", "heal", "eval"):
        parser.add_argument(f"--{name}", default="", help=f"more options of `{name}`, as one word")
    options = parser.parse_args()
    if options.model:
        options.name = options.name or options.model
        for seed in range(options.seeds):
            for asked in options.ratios:
                for arm in (arm for arm in ARMS if options.only in arm):
                    run(arm, asked, seed, options)
    print(table(known()))


if __name__ == "__main__":
    main()
