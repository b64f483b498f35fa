"""Measure who shares with profit: one recipe from scratch in many forms of equal stored numbers, at several MACs.

    python benchmarks/sharing.py --seeds 3 [--only neurons] [--tokens 2097152] [--smoke]

Every row is one `pilon-compress train`, run like a user's. Rows go to docs/results/sharing.json, from which the tables
of docs/results/sharing.md are made; those that are there are not run again, so that a long table grows row by row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sharing.json"
SHARED = ["--set", "ffn.share=always"]
NEURONS = [*SHARED, "--set", "ffn.primitive=neurons"]
TIED = [*NEURONS, "--set", "ffn.scales=false"]
ARMS: dict[str, tuple[int, list[str]]] = {
    "dense": (0, ["--ffn", "dense"]),
    "fewer neurons": (1, ["--set", "ffn.primitive=neurons", "--set", "ffn.share=none"]),
    "private factors": (1, ["--ffn", "lowrank"]),
    "shared factors, MACs 2x": (2, SHARED),
    "shared factors, MACs 4x": (4, SHARED),
    "neuron bank, MACs 2x": (2, NEURONS),
    "neuron bank, MACs 3x": (3, NEURONS),
    "neuron bank, MACs 4x": (4, NEURONS),
    "tied blocks, MACs 2x": (2, TIED),
    "tied blocks, MACs 3x": (3, TIED),
}
"""Forms by name: their MAC ratio over their stored ratio (0: dense), and what makes them."""


def words_of(arm: str, asked: float) -> list[str]:
    """Return what to add to `train` for one arm at the stored ratio `asked`."""
    multiple, words = ARMS[arm]
    if not multiple:
        return words
    macs = ["--set", f"ffn.mac_ratio={min(1.0, round(multiple * asked, 3))}"] if multiple > 1 else []
    return ["--set", f"ffn.ffn_ratio={asked}", *words, *macs]


def train(arm: str, asked: float, seed: int, tokens: int, rate: float) -> dict[str, Any]:
    """Train one arm and return its row: validation perplexity beside stored numbers, bytes and MACs."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--recipe", "tiny", "-o", f"{folder}/out", "--json", "--set", "ffn.dense_until=0"]
        words += ["--set", f"schedule.tokens={tokens}", "--set", f"seed={seed}", *words_of(arm, asked)]
        words += ["--set", f"optimizer.learning_rate={rate}"]
        done = subprocess.run(
            [sys.executable, "-m", "pilon_compress.cli", *words], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"{arm}: {done.stderr}")
    told = json.loads(done.stdout)
    ffn = told.get("ffn") or {}
    sizes = {name: ffn.get(name) for name in ("stored_ratio", "mac_ratio", "bytes", "shared_primitives")}
    head = {"asked": asked, "arm": arm, "seed": seed, "tokens": tokens, "rate": rate}
    return {**head, "perplexity": told["val_perplexity"], **sizes}


def known() -> list[dict[str, Any]]:
    """Return the rows that are on record."""
    return json.loads(RESULTS.read_text())["scratch"] if RESULTS.is_file() else []


def record(row: dict[str, Any]) -> None:
    """Add a row to the record, which other processes may be writing, too."""
    rows = [*known(), row]
    place = list(ARMS).index
    rows.sort(key=lambda one: (one["tokens"], -one["asked"], place(one["arm"]), one["rate"], one["seed"]))
    RESULTS.write_text(json.dumps({"scratch": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]], tokens: int) -> str:
    """Return the rows of one length as Markdown: mean and range of perplexities, over the dense model's mean."""
    here = [row for row in rows if row["tokens"] == tokens]
    dense = [row["perplexity"] for row in here if row["arm"] == "dense"]
    lines = ["| form | stored | MACs | perplexity, mean (range) of seeds | ÷ dense |", "|---|---|---|---|---|"]
    for asked, arm in dict.fromkeys((row["asked"], row["arm"]) for row in here):
        mine = [row for row in here if (row["asked"], row["arm"]) == (asked, arm)]
        values = [row["perplexity"] for row in mine]
        ratio = f"{mean(values) / mean(dense):.3f}" if dense else ""
        sizes = [f"{mine[0][name] or 1:.3f}" for name in ("stored_ratio", "mac_ratio")]
        spread = f"{mean(values):.1f} ({min(values):.1f}–{max(values):.1f}) of {len(values)}"
        lines.append(f"| {arm} | {' | '.join(sizes)} | {spread} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", type=float, default=0.25, help="stored numbers of the feed-forward part over dense")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--tokens", type=int, default=2097152)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--smoke", action="store_true", help="a few steps of one arm, nothing on record")
    parser.add_argument("--table", action="store_true", help="print the table of what is on record")
    options = parser.parse_args()
    if options.smoke:
        print(train("neuron bank, MACs 2x", 0.25, 0, 8192, options.rate))
        return
    wanted = [(seed, arm) for seed in range(options.seeds) for arm in ARMS if options.only in arm]
    for seed, arm in [] if options.table else wanted:
        stored = options.stored if ARMS[arm][0] else 1.0
        asked = {"arm": arm, "asked": stored, "seed": seed, "tokens": options.tokens, "rate": options.rate}
        if not any(asked.items() <= row.items() for row in known()):
            record(train(arm, stored, seed, options.tokens, options.rate))
    print(table(known(), options.tokens))


if __name__ == "__main__":
    main()
