"""Measure experts over one bank against their controls, from scratch: equal stored numbers, equal MACs.

    python benchmarks/moe.py --seeds 3 [--only neurons] [--tokens 2097152] [--smoke]
    python benchmarks/moe.py --steps          time of a training step over that of a static composition

Every row is one `pilon-compress train`, run like a user's. Rows go to docs/results/moe.json; those that are there are
not run again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "moe.json"
HALF = ["--set", "ffn.ffn_ratio=0.5"]
EVEN = [*HALF, "--set", "ffn.mac_ratio=0.5"]
SPARSE = [*HALF, "--set", "ffn.mac_ratio=0.25"]
NEURONS = ["--set", "ffn.primitive=neurons"]
ARMS: dict[str, list[str]] = {
    "static factors, stored .5, MACs .5": EVEN,
    "fewer neurons, stored .5, MACs .5": [*EVEN, *NEURONS],
    "experts of factors 2/8, stored .5, MACs .5": [*EVEN, "--moe", "experts=8,top_k=2"],
    "mixed recipes 2/8, stored .5, MACs .5": [*EVEN, "--moe", "experts=8,top_k=2,mix=recipes"],
    "experts of neurons 2/8, stored .5, MACs .5": [*EVEN, *NEURONS, "--moe", "experts=8,top_k=2"],
    "static factors, stored .25, MACs .25": ["--set", "ffn.ffn_ratio=0.25"],
    "experts of factors 2/4, stored .5, MACs .25": [*SPARSE, "--moe", "experts=4,top_k=2"],
    "experts of neurons 2/4, stored .5, MACs .25": [*SPARSE, *NEURONS, "--moe", "experts=4,top_k=2"],
    "private experts 2/4, stored .5, MACs .25": [
        *(*SPARSE, *NEURONS, "--moe", "experts=4,top_k=2"),
        *("--set", "ffn.share=none", "--set", "ffn.scales=false"),
    ],
}


def train(recipe: str, arm: str, seed: int, tokens: int) -> dict[str, Any]:
    """Train one arm and return its row: validation perplexity beside stored numbers, bytes and MACs."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "--recipe", recipe, "-o", f"{folder}/out", "--json", "--set", "ffn.dense_until=0"]
        words += ["--set", f"schedule.tokens={tokens}", "--set", f"seed={seed}", *ARMS[arm]]
        done = subprocess.run(
            [sys.executable, "-m", "pilon_compress.cli", *words], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"{arm}: {done.stderr}")
    told = json.loads(done.stdout)
    sizes = {name: told["ffn"].get(name) for name in ("stored_ratio", "mac_ratio", "bytes", "shared_primitives")}
    routing = {name: value for name, value in (told.get("routing") or {}).items() if name != "load"}
    row = {"recipe": recipe, "arm": arm, "seed": seed, "tokens": tokens, "perplexity": told["val_perplexity"]}
    return row | sizes | routing


def steps(repeats: int) -> list[dict[str, Any]]:
    """Return the times of a training step, forward and backward, of each form in turn, over static's; CPU."""
    import torch

    from pilon_compress.config import training
    from pilon_compress.distill.losses import NextToken
    from pilon_compress.models import base_architectures
    from pilon_compress.train.preflight import layout_asked

    torch.set_num_threads(1)
    models = {}
    for arm in [one for one in ARMS if "MACs .5" in one]:
        pairs = [word for word in ARMS[arm] if word not in ("--set", "--moe")]
        overrides = [word if word.startswith("ffn.") else f"ffn.moe='{word}'" for word in pairs]
        recipe = training.load("tiny", ["ffn.dense_until=0", *overrides])
        config = base_architectures.config_for(recipe.host, recipe.data.sequence_length, 0)
        models[arm] = NextToken(base_architectures.build_with(config, layout_asked(recipe, config), 0))
    ids = torch.randint(0, 2048, (16, 256), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {arm: [] for arm in models}
    for _ in range(repeats):
        for arm, model in models.items():
            begun = time.process_time()
            model({"input_ids": ids}, ids).backward()
            times[arm].append(time.process_time() - begun)
            model.zero_grad()
    base = median(times["static factors, stored .5, MACs .5"][1:])
    return [
        {"arm": arm, "seconds": median(found[1:]), "ratio": median(found[1:]) / base} for arm, found in times.items()
    ]


def known() -> dict[str, list[dict[str, Any]]]:
    """Return the rows that are on record."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"scratch": [], "steps": []}


def record(row: dict[str, Any]) -> None:
    """Add a row of a training to the record, which other processes may be writing, too."""
    found = known()
    rows = [*found["scratch"], row]
    rows.sort(key=lambda one: (one["recipe"], one["tokens"], list(ARMS).index(one["arm"]), one["seed"]))
    RESULTS.write_text(json.dumps({**found, "scratch": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]], recipe: str, tokens: int) -> str:
    """Return the rows of one recipe and length as Markdown: mean and range of perplexities."""
    lines = ["| form | stored | MACs | perplexity, mean (range) of seeds | router entropy | cosine of experts |"]
    lines += ["|---|---|---|---|---|---|"]
    for arm in ARMS:
        here = {"recipe": recipe, "tokens": tokens, "arm": arm}
        mine = [row for row in rows if here.items() <= row.items()]
        if mine:
            values = [row["perplexity"] for row in mine]
            spread = f"{mean(values):.2f} ({min(values):.2f}–{max(values):.2f}) of {len(values)}"
            sizes = [f"{mine[0][name]:.3f}" for name in ("stored_ratio", "mac_ratio")]
            routing = [f"{mine[0][name]:.2f}" if name in mine[0] else "" for name in ("entropy", "similarity")]
            lines.append(f"| {' | '.join([arm.partition(',')[0], *sizes, spread, *routing])} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--tokens", type=int, default=2097152)
    parser.add_argument("--steps", type=int, default=0, help="time this many steps of each form instead")
    parser.add_argument("--smoke", action="store_true", help="a few steps of one arm, nothing on record")
    options = parser.parse_args()
    if options.smoke:
        print(train("smoke", "experts of factors 2/8, stored .5, MACs .5", 0, 8192))
        return
    if options.steps:
        found = steps(options.steps)
        RESULTS.write_text(json.dumps({**known(), "steps": found}, indent=1) + "\n")
        print(json.dumps(found, indent=1))
        return
    for seed, arm in [(seed, arm) for seed in range(options.seeds) for arm in ARMS if options.only in arm]:
        asked = {"recipe": options.recipe, "arm": arm, "seed": seed, "tokens": options.tokens}
        if not any(asked.items() <= row.items() for row in known()["scratch"]):
            record(train(options.recipe, arm, seed, options.tokens))
    print(table(known()["scratch"], options.recipe, options.tokens))


if __name__ == "__main__":
    main()
