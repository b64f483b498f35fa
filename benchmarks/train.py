"""Train one arm of a comparison on text that is installed on this machine; prints a short table last.

PYTHONPATH=. python3 benchmarks/train.py pilon out/gpu/48m-pilon            stopped, the same command goes on
PYTHONPATH=. python3 benchmarks/train.py pilon /tmp/smoke --smoke           seconds, on a CPU
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import corpus
import torch
import transformers

ARMS = {
    "dense": ["ffn.kind=dense"],
    "lowrank": ["ffn.kind=lowrank"],
    "pilon": [],
    "pilon-warm": ["ffn.dense_until=0.5"],
    "pilon-quarter": ["ffn.mac_ratio=0.3125"],  # k·r = d/4 where the inner width is 4 d
    "pilon-softmax": ["ffn.composition=softmax"],  # the original's
    "pilon-ternary": ["ternary.enabled=true"],
    "pilon-warm-ternary": ["ffn.dense_until=0.5", "ternary.enabled=true"],
    "narrow": ["ffn.primitive=neurons"],  # a dense block of as many neurons as the budget pays for
    "pilon-anneal": ["research.original.selection.explore=anneal"],
    "pilon-adamw": ["optimizer.name=adamw"],
}

HALF = ["ffn.share=auto", "ffn.ffn_ratio=0.5", "ffn.mac_ratio=0.5"]  # what the arms differ from
RANKS = {"48m": 32, "360m": 64, "500m": 64}


def main(words: list[str] | None = None) -> None:
    """Train one arm, and print its JSON and its table."""
    options = parsed(words)
    started = time.time()
    recipe, overrides = recipe_of(options)

    from pilon_compress.config import training
    from pilon_compress.train.pipeline import train_model

    result = train_model(training.load(recipe, overrides), options.output, resume=True).dump()
    rows = {"arm": options.arm, "recipe": recipe, **figures(result), "seconds, all of it": round(time.time() - started)}
    rows["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rows["versions"] = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps(rows))
    for name, value in rows.items():
        print(f"{name:<24}{value}")


def parsed(words: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line, or of `words`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", default="48m")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--megabytes", type=float, default=420)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a very small model on little text")
    return parser.parse_args(words)


def recipe_of(options: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the recipe of an arm and its overrides; write the text, and keep its tokens beside it."""
    os.environ.setdefault("PILON_CACHE", str(options.output.parent / "tokens"))
    megabytes = 0.5 if options.smoke else options.megabytes
    text = corpus.write(options.output.parent / f"text-{options.megabytes:g}.jsonl", megabytes)
    overrides = [f"data.source={text}", "data.streaming=false", "host.tokenizer=bpe", f"seed={options.seed}"]
    overrides += ["run.checkpoint_every=120", "run.sample=null", *HALF]
    overrides += [f"ffn.rank={RANKS[options.recipe]}"] if options.recipe in RANKS and not options.smoke else []
    overrides += ARMS[options.arm]
    if options.smoke:
        return "smoke", [*overrides, "schedule.tokens=8192", "data.validation_sequences=8", "device=cpu"]
    overrides += [f"schedule.tokens={options.tokens}", f"run.batch_size={options.batch_size}", "host.vocab_size=32768"]
    return options.recipe, overrides


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a training by their names in the table."""
    from pilon_compress.optimize.monitor import memory_gib

    return {
        "parameters": result["parameters"],
        "FFN stored ÷ dense": round(result["ffn"]["stored_ratio"], 3),
        "FFN MACs ÷ dense": round(result["ffn"]["mac_ratio"], 3),
        "tokens": result["tokens"],
        "validation perplexity": round(result["val_perplexity"], 3),
        "tokens per second": round(result["tokens_per_second"]),
        "memory, GiB": round(memory_gib(torch.device(result["device"])), 2),
    }


if __name__ == "__main__":
    main()
