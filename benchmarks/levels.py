"""Heal a converted model with weights of three or five levels, times a scale: {-1, 0, 1} or {-2 .. 2}.

python benchmarks/levels.py out/llama-0.4 out/three 3 --data stdlib --tokens 200000
python benchmarks/levels.py out/llama-0.275 out/five 5 --data stdlib --tokens 200000

An experiment: the model that it writes loads as a ternary one, so only the printed perplexity is that of five levels.
At equal bytes five levels (2.33 bits, three in seven bits) have 0.69 times the numbers of three (1.6 bits).
"""

import argparse
from typing import Any

from torch import Tensor

from pilon_compress.config import training
from pilon_compress.nn.formats import ternary
from pilon_compress.nn.ternary_quantizer import Rounding, rounded
from pilon_compress.train.pipeline import train_model

BITS = {3: 1.6, 5: 7 / 3}


def use_levels(count: int) -> None:
    """Let banks and matrices in training round to so many levels; the step stays the mean magnitude."""
    limit = count // 2

    def digits(weight: Tensor, scale: Tensor, rounding: Rounding = rounded) -> Tensor:
        return rounding(weight.float() / scale, limit)

    changed: Any = ternary
    changed.digits = digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start")
    parser.add_argument("output")
    parser.add_argument("levels", type=int, choices=sorted(BITS))
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    asked = parser.parse_args()
    use_levels(asked.levels)
    recipe = training.build(
        {
            "task": "heal",
            "start": asked.start,
            "ternary": {"enabled": True, "after": 0.0},
            "data": {"source": asked.data, "sequence_length": 256},
            "schedule": {"tokens": asked.tokens},
            "optimizer": {"learning_rate": 2e-2},
            "run": {"batch_size": 8, "evaluate_every": 24},
        },
        asked.changes,
    )
    result = train_model(recipe, asked.output, overwrite=True)
    assert result is not None
    size = result.ffn.stored_ratio * BITS[asked.levels] / 16
    print(f"{asked.levels} levels  stored {result.ffn.stored_ratio:.3f}  bytes about {size:.4f} of bfloat16")
    print(f"perplexity {result.before:.2f} -> {result.val_perplexity:.2f}, teacher {result.teacher:.2f}")


if __name__ == "__main__":
    main()
