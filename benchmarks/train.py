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
    "narrow": ["ffn.matrices=true"],  # a dense block of as many neurons as the budget pays for
    "pilon-anneal": ["research.original.selection.explore=anneal"],
    "pilon-adamw": ["optimizer.name=adamw"],
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", default="48m")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--megabytes", type=float, default=420)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a very small model on little text")
    asked = parser.parse_args(words)
    os.environ.setdefault("PILON_CACHE", str(asked.output.parent / "tokens"))
    text = corpus.write(asked.output.parent / f"text-{asked.megabytes:g}.jsonl", 2 if asked.smoke else asked.megabytes)
    overrides = [f"data.source={text}", "data.streaming=false", "host.tokenizer=bpe", f"seed={asked.seed}"]
    overrides += ["run.checkpoint_every=120", "run.sample=null", *ARMS[asked.arm]]
    if asked.smoke:
        overrides += ["schedule.tokens=8192", "device=cpu"]
    else:
        overrides += [f"schedule.tokens={asked.tokens}", f"run.batch_size={asked.batch_size}", "host.vocab_size=32768"]

    from pilon_compress.config import training
    from pilon_compress.optimize.monitor import memory_gib
    from pilon_compress.train.pipeline import train_model

    started = time.time()
    settings = training.load("smoke" if asked.smoke else asked.recipe, overrides)
    result = train_model(settings, asked.output, resume=True).dump()
    rows = {
        "arm": asked.arm,
        "recipe": "smoke" if asked.smoke else asked.recipe,
        "parameters": result["parameters"],
        "FFN stored ÷ dense": round(result["ffn"]["stored_ratio"], 3),
        "FFN MACs ÷ dense": round(result["ffn"]["mac_ratio"], 3),
        "tokens": result["tokens"],
        "validation perplexity": round(result["val_perplexity"], 3),
        "tokens per second": round(result["tokens_per_second"]),
        "memory, GiB": round(memory_gib(torch.device(result["device"])), 2),
        "seconds, all of it": round(time.time() - started),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    print(json.dumps(rows))
    for name, value in rows.items():
        print(f"{name:<24}{value}")


if __name__ == "__main__":
    main()
